"""The API's reference for a browser: a page that reads /openapi.json and shows it."""
