# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens in the backend, told to whoever wants to know.

Emitting never waits: each subscriber has a queue of its own, and one that falls
too far behind loses the oldest events and is told how many.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAX_WAITING = 10_000


@dataclass(frozen=True)
class Event:
    """One event, named as in QAPI."""

    name: str
    data: dict[str, Any]
    timestamp: float = field(default_factory=time.time)


class Subscription:
    """An async iterator over events, from the moment of subscribing on."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self._waiting: deque[Event] = deque(maxlen=MAX_WAITING)
        self._wakeup = asyncio.Event()
        self._closed = False
        self.lost = 0

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        event = await self.get()
        if event is None:
            raise StopAsyncIteration
        return event

    async def get(self) -> Event | None:
        """The next event; None once the subscription is closed and empty."""
        while not self._waiting:
            if self._closed:
                return None
            self._wakeup.clear()
            await self._wakeup.wait()
        return self._waiting.popleft()

    def close(self) -> None:
        """No more events; those that wait can still be read."""
        self._bus.forget(self)
        self._closed = True
        self._wakeup.set()

    def put(self, event: Event) -> None:
        """Called by the bus."""
        if len(self._waiting) == MAX_WAITING:
            self.lost += 1
        self._waiting.append(event)
        self._wakeup.set()


class EventBus:
    """Where events are emitted and subscribed to."""

    def __init__(self) -> None:
        self._subscriptions: list[Subscription] = []
        self._listeners: list[Callable[[Event], None]] = []

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Tell everyone, now."""
        event = Event(name, data)
        for listener in list(self._listeners):
            listener(event)
        for subscription in list(self._subscriptions):
            subscription.put(event)

    def subscribe(self) -> Subscription:
        """A queue of the events to come."""
        subscription = Subscription(self)
        self._subscriptions.append(subscription)
        return subscription

    def listen(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call `listener` at once for each event to come; returns how to stop that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def forget(self, subscription: Subscription) -> None:
        """Called by Subscription.close()."""
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    def close(self) -> None:
        """End every subscription."""
        for subscription in list(self._subscriptions):
            subscription.close()
