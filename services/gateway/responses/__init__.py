"""Responses that are kept between requests, in Redis, so that any gateway can answer for them."""
