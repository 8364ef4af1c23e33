"""Way of a body into the gateway: a slot among all requests, memory for its bytes, limits on size and time."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
from starlette.requests import Request

from services.gateway.http.admission import Admission
from services.gateway.http.body import BodyLimits, read_body
from services.gateway.http.memory import BodyMemory, Reservation


class Intake(msgspec.Struct, frozen=True):
    """Reader of the bodies of all routes that have one."""

    admission: Admission
    memory: BodyMemory
    limits: BodyLimits

    @asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[tuple[bytes, Reservation]]:
        """Yield the body, whose slot and memory are held until the block is left. The caller alone keeps the bytes.

        Raises:
            RequestError: 503 while draining, 429 when full; or what `read_body` raises.
            ClientDisconnect: the client left in the middle.
        """
        with self.admission.arrival() as take_slot, self.memory.reservation() as reservation:
            yield await self._read(request, reservation, take_slot), reservation

    async def _read(self, request: Request, reservation: Reservation, take_slot: Callable[[], None]) -> bytes:
        body = await read_body(request, self.limits, reservation)
        take_slot()
        return body
