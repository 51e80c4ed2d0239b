"""Self-contained HTML pages: cards with a sentence, and a picture or a table.

`page.html.jinja` with `page.css`; the pictures are in `pictures.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup


@dataclass(frozen=True)
class Card:
    """A section of the page: a heading, a sentence, and a picture or a table.

    `numeric` are the columns of the table that are aligned as numbers; `wide` takes both columns
    of the page. Texts are escaped by the template, pictures and cells of `Markup` are not.
    """

    title: str
    about: str
    picture: Markup = Markup()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    numeric: Sequence[int] = ()
    wide: bool = False


def render(
    name: str, about: Sequence[str], tiles: Mapping[str, str], cards: Sequence[Card]
) -> bytes:
    """The page called `name`, in UTF-8: what it is `about`, large numbers (`tiles`: what each is,
    and its value), and cards.
    """
    room = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(room), autoescape=True, undefined=jinja2.StrictUndefined
    )
    style = Markup((room / "page.css").read_text(encoding="utf-8"))
    template = environment.get_template("page.html.jinja")
    page = template.render(style=style, name=name, about=about, tiles=tiles, cards=cards)
    return page.encode("utf-8", "backslashreplace")
