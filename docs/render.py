"""Markdown and code as HTML that needs no network: equations are MathML, which browsers draw by themselves."""

import re

from latex2mathml.converter import convert
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

TAG = re.compile(r"\\tag\{(.*?)\}")
REACHED = 'tabindex="0"'  # what is wide scrolls by itself, and so must be reached by keys


class _Renderer(IPythonRenderer):
    def block_math(self, body: str) -> str:
        number = TAG.search(body)
        label = f"<span>({number[1]})</span>" if number else ""
        equation = convert(TAG.sub("", body).strip(), display="block")
        return f'<div class="equation" {REACHED}>{equation}{label}</div>'

    def inline_math(self, body: str) -> str:
        return convert(body.strip())

    def heading(self, text: str, level: int, **_) -> str:
        name = re.sub(r"\W+", "-", re.sub("<.*?>", "", text).lower()).strip("-")
        return f'<h{level} id="{name}">{text}</h{level}>\n'


def markdown(text: str, escape: bool = False) -> str:
    """HTML of Markdown; escape: whether HTML in it is text."""
    html = MarkdownWithMath(renderer=_Renderer(escape=escape)).render(text)
    html = html.replace("<pre>", f"<pre {REACHED}>").replace("</table>", "</table></div>")
    return html.replace("<table>", f'<div class="table" {REACHED} role="group" aria-label="table"><table>')


def python(source: str) -> str:
    """HTML of Python code."""
    return highlight(source, PythonLexer(), HtmlFormatter()).replace("<pre>", f"<pre {REACHED}>")


def heading(text: str) -> str:
    """The first line of Markdown."""
    return text.partition("\n")[0].strip("# ")
