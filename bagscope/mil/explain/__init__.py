"""Why a model says what it says of a slide: edited bags, attributions, how far to trust them."""
