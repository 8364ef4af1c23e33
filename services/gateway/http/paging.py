"""Lists that clients read a page at a time, by OpenAI's parameters: `order`, `limit` and `after`."""

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request

from shared.errors import invalid

_NUMBER = re.compile(r"\d{1,15}")


class Page(msgspec.Struct, frozen=True):
    """Page that a client asks for."""

    order: str  # asc or desc
    limit: int
    after: str | None  # id of the last item that it has

    def cut(self, names: Sequence[str]) -> tuple[range, bool]:
        """Return the places of this page's items in a list that has these ids, and whether more follow.

        Raises:
            RequestError: 400, `after` is none of them.
        """
        begin = 0
        if self.after is not None:
            if self.after not in names:
                raise invalid(f"`after`: {self.after!r:.70} is not an item of this list.", "after")
            begin = names.index(self.after) + 1
        end = min(begin + self.limit, len(names))
        return range(begin, end), end < len(names)


def read_page(request: Request, most: int, default: int) -> Page:
    """Return the page that a request asks for.

    Raises:
        RequestError: 400, a parameter is malformed.
    """
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid(f"`order` must be asc or desc, not {order!r:.50}.", "order")
    limit = request.query_params.get("limit", str(default))
    if not _NUMBER.fullmatch(limit) or not 1 <= int(limit) <= most:
        raise invalid(f"`limit` must be a number from 1 to {most}.", "limit")
    return Page(order, int(limit), request.query_params.get("after"))


def listing(items: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """Return a page as OpenAI's clients read it."""
    ids = [item["id"] for item in items] or [None]
    return {"object": "list", "data": items, "first_id": ids[0], "last_id": ids[-1], "has_more": has_more}
