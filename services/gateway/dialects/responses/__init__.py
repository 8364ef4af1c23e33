"""OpenAI's Responses API: its words for a request, the items of its answers, and their numbered events."""
