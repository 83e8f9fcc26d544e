"""Synthetic instruction data from a seed: smart-home requests, and the JSON commands they stand for.

A pretrained chat model answers such a request with prose. The language is strict (one spelling per command), so
learning can be measured by exact match.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from lightning_sft.types import InputError

_MOST = 15_000  # rows; the last of all requests would take forever to be drawn
_ROOMS = ("kitchen", "bedroom", "bathroom", "hallway", "office", "garage", "attic", "nursery", "living room")
_NAMES = ("Anna", "Ben", "Chloe", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kim", "Lena")
_TEXTS = (
    "I am late",
    "dinner is ready",
    "call me back",
    "the train is cancelled",
    "see you at noon",
    "I found the keys",
)
_GOODS = ("eggs", "apples", "candles", "batteries", "lemons", "sponges", "bagels", "onions", "light bulbs", "pears")
_DISHES = ("pasta", "rice", "tea", "pizza", "bread", "soup")
_DAYS = {"mon": "Monday", "tue": "Tuesday", "wed": "Wednesday", "thu": "Thursday", "fri": "Friday", "sat": "Saturday"}
_SYSTEM = "You control a home."
_POLITE = ("{}", "Please {}", "Could you {}?", "Hey, {}", "I would like you to {}", "{}, thanks")


def _light(r: Random) -> tuple[str, dict[str, Any]]:
    room, level = r.choice(_ROOMS), r.choice((0, 100, r.randrange(5, 100, 5)))
    phrases = {0: ("turn off the {0} light", "make it dark in the {0}"), 100: ("turn the {0} light all the way up",)}
    dimmed = (
        "dim the {0} light to {1} percent",
        "set the light in the {0} to {1} percent",
        "bring the {0} light to {1} percent",
    )
    return r.choice(phrases.get(level, dimmed)).format(room, level), {"do": "light", "room": room, "level": level}


def _heat(r: Random) -> tuple[str, dict[str, Any]]:
    room, celsius = r.choice(_ROOMS), r.randrange(15, 26)
    phrase = r.choice(("heat the {0} to {1} degrees", "make it {1} degrees in the {0}", "set the {0} to {1} degrees"))
    return phrase.format(room, celsius), {"do": "heat", "room": room, "celsius": celsius}


def _alarm(r: Random) -> tuple[str, dict[str, Any]]:
    day, hour, minute = r.choice(list(_DAYS)), r.randrange(4, 12), r.choice((0, 15, 30, 45))
    spoken = {0: f"{hour} o'clock", 15: f"quarter past {hour}", 30: f"half past {hour}", 45: f"quarter to {hour + 1}"}
    phrase = r.choice(("wake me at {0} on {1}", "set an alarm for {0} on {1}", "get me up at {0} on {1}"))
    return phrase.format(spoken[minute], _DAYS[day]), {"do": "alarm", "day": day, "at": f"{hour:02}:{minute:02}"}


def _timer(r: Random) -> tuple[str, dict[str, Any]]:
    dish, minutes = r.choice(_DISHES), r.randrange(2, 60)
    phrase = r.choice(("start a timer of {1} minutes for the {0}", "remind me of the {0} in {1} minutes"))
    return phrase.format(dish, minutes), {"do": "timer", "for": dish, "minutes": minutes}


def _message(r: Random) -> tuple[str, dict[str, Any]]:
    name, text = r.choice(_NAMES), r.choice(_TEXTS)
    phrase = r.choice(("tell {0} that {1}", "send {0} a message: {1}", "let {0} know: {1}"))
    return phrase.format(name, text), {"do": "message", "to": name, "text": text}


def _buy(r: Random) -> tuple[str, dict[str, Any]]:
    goods, count = r.choice(_GOODS), r.randrange(2, 25)
    phrase = r.choice(("put {1} {0} on the list", "buy {1} {0}", "order {1} {0}", "get us {1} {0}"))
    return phrase.format(goods, count), {"do": "buy", "item": goods, "count": count}


_COMMANDS = (_light, _heat, _alarm, _timer, _message, _buy)


def command_rows(num_rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Requests and their commands, without duplicate requests.

    Args:
        num_rows: Number of rows, at most 15,000: there are about 19,000 different requests.
        seed: Seed of the choice.

    Raises:
        InputError: When more rows are asked for.

    >>> command_rows(1)[0]["prompt"], command_rows(1)[0]["completion"]
    ('I would like you to remind me of the pizza in 4 minutes', '{"do": "timer", "for": "pizza", "minutes": 4}')
    """
    if num_rows > _MOST:
        raise InputError(f"There are no {num_rows:,} different requests; ask for {_MOST:,} rows at most.")
    r = Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < num_rows:
        request, command = r.choice(_COMMANDS)(r)
        request = r.choice(_POLITE).format(request)
        rows[request[0].upper() + request[1:]] = json.dumps(command)
    return [{"system": _SYSTEM, "prompt": request, "completion": command} for request, command in rows.items()]


def write_demo_data(folder: str | Path, num_train: int = 500, num_test: int = 100, seed: int = 0) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``test.jsonl``, which share no requests, and return their paths."""
    rows = command_rows(num_train + num_test, seed)
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = Path(folder) / "train.jsonl", Path(folder) / "test.jsonl"
    for path, part in zip(paths, (rows[:num_train], rows[num_train:]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return paths
