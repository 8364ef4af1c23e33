"""APIs by which clients ask the same thing: each states a request, and its answer, in its own words."""
