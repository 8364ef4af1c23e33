"""A parser of requests that renders their prompts itself, where the gateway has processes for it."""

from pathlib import Path

from services.gateway.dialects.chat import ChatDialect
from services.gateway.dialects.dialect import Dialect
from services.gateway.request.chat import Rendering, template_failure
from services.gateway.request.parsed import ParsedRequest, RequestParser
from services.gateway.request.template import Template, TemplateFailureError, TemplateSource

MAX_CHARS = 100_000
CHAT = ChatDialect()


class WholeParser(RequestParser, frozen=True, kw_only=True):
    """Parser with the checkpoint's template."""

    template: TemplateSource

    def parse(self, body: bytes, dialect: Dialect = CHAT) -> ParsedRequest:
        """Validate, render and tokenise a request."""
        draft = self.read(dialect.read(body))
        return self.finish(draft, render(self.template, draft.rendering))


def render(template: TemplateSource, rendering: Rendering) -> str:
    """Render in this process, with the errors of `TemplateRenderer`."""
    own = rendering.own_template
    source = template if own is None else TemplateSource("chat_template", own, template.tokens)
    try:
        return Template(source, MAX_CHARS).render(rendering.variables)
    except TemplateFailureError as error:
        raise template_failure(str(error), source.name, own) from error


def load_template(directory: Path, max_chars: int) -> Template:
    """Compile the template of a checkpoint."""
    return Template(TemplateSource.load(directory), max_chars)
