"""What an image says of its making: XMP and C2PA manifests, written, signed and verified.

XMP needs no library beyond Python's. c2pa-python (the extra ``c2pa``) is imported only to sign or to verify.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from text2img import __version__
from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping


log = logging.getLogger(__name__)

SOURCE_TYPE: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for media that a trained model generated."""
MAX_STATEMENT_CHARS: Final = 2_000
"""Of the creator, of the rights, and of the model's name in XMP."""
_MAX_PACKET: Final = 65_000
"""Bytes: a JPEG holds XMP in one segment of at most 65,502; a longer prompt is cut."""
_NAMESPACES: Final = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
}
_NOT_XML: Final = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ESCAPES: Final = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\r": "&#13;"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Marking:
    """What images say beyond their parameters: creator and rights, and where the prompt is kept.

    ``prompt`` None: in the parameters; True: in XMP as well; False: nowhere in the file.
    """

    creator: str | None = None
    rights: str | None = None
    prompt: bool | None = None

    def embedded(self, parameters: Mapping[str, object]) -> Mapping[str, object]:
        """Return the parameters that the file may contain."""
        if self.prompt is not False:
            return parameters
        return {name: value for name, value in parameters.items() if name not in PROMPT_FIELDS}

    def xmp(self, parameters: Mapping[str, object]) -> bytes:
        """Return the XMP packet, the same for the same parameters, of at most 65,000 bytes."""
        prompt = _prompt_information(parameters) if self.prompt else ""
        packet = self._packet(parameters, prompt)
        while len(packet) > _MAX_PACKET and prompt:
            excess = (len(packet) - _MAX_PACKET) / len(_escaped(prompt).encode())
            prompt = prompt[: int(len(prompt) * (1 - excess)) - 2] + "…" if excess < 1 else ""
            packet = self._packet(parameters, prompt)
        return packet

    def _packet(self, parameters: Mapping[str, object], prompt: str) -> bytes:
        values = {
            "Iptc4xmpExt:DigitalSourceType": SOURCE_TYPE,
            "xmp:CreatorTool": str(parameters.get("software") or f"text2img {__version__}"),
            "Iptc4xmpExt:AISystemUsed": str(parameters.get("model") or "")[:MAX_STATEMENT_CHARS],
            "Iptc4xmpExt:AISystemVersionUsed": str(parameters.get("revision") or "")[:MAX_STATEMENT_CHARS],
            "Iptc4xmpExt:AIPromptInformation": prompt,
        }
        lines = [f"  <{name}>{_escaped(value)}</{name}>\n" for name, value in values.items() if value]
        if self.creator:
            item = f"<rdf:li>{_escaped(self.creator)}</rdf:li>"
            lines.append(f"  <dc:creator><rdf:Seq>{item}</rdf:Seq></dc:creator>\n")
        if self.rights:
            item = f'<rdf:li xml:lang="x-default">{_escaped(self.rights)}</rdf:li>'
            lines.append(f"  <dc:rights><rdf:Alt>{item}</rdf:Alt></dc:rights>\n")
        declared = " ".join(f'xmlns:{prefix}="{url}"' for prefix, url in _NAMESPACES.items())
        return (
            '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
            f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF {declared}>\n'
            f' <rdf:Description rdf:about="">\n{"".join(lines)} </rdf:Description>\n'
            '</rdf:RDF></x:xmpmeta>\n<?xpacket end="w"?>'
        ).encode()


PROMPT_FIELDS: Final = ("prompt", "negative_prompt")
"""The parameters that are the prompt's text."""


def check_statement(option: str, value: str | None) -> str | None:
    """Return the text of ``--creator`` or ``--rights``, None for an empty one.

    Raises ConfigurationError, which names the ``option``, for a text that is too long or not XML's.
    """
    text = (value or "").strip()
    if len(text) > MAX_STATEMENT_CHARS:
        raise ConfigurationError(f"{option} must not be longer than {MAX_STATEMENT_CHARS:,} characters")
    if _NOT_XML.search(text):
        raise ConfigurationError(f"{option} contains a control character, which XMP cannot hold; remove it")
    return text or None


def _prompt_information(parameters: Mapping[str, object]) -> str:
    prompt, negative = (str(parameters.get(name) or "") for name in PROMPT_FIELDS)
    return f"{prompt}\nNegative prompt: {negative}" if negative else prompt


def _escaped(text: str) -> str:
    """Return the text for XML; what XML 1.0 cannot hold becomes U+FFFD."""
    text = _NOT_XML.sub("\ufffd", text)
    return "".join(_ESCAPES.get(char, char) for char in text)


def read_xmp(packet: bytes) -> dict[str, str]:
    """Return the statements of an XMP packet that Marking writes, by name; raise ValueError if it is none.

    Other programs may have written them as attributes or as elements.
    """
    from xml.etree import ElementTree as ET

    if b"<!DOCTYPE" in packet or b"<!ENTITY" in packet:
        raise ValueError("it declares a document type")
    try:
        root = ET.fromstring(packet.strip(b"\0 \r\n\t").decode("utf-8-sig"))  # noqa: S314 - no entities
    except ET.ParseError as exc:
        raise ValueError("it is not XML") from exc
    found: dict[str, str] = {}
    for prefix, name in _STATEMENTS:
        tag = f"{{{_NAMESPACES[prefix]}}}{name}"
        element = next(root.iter(tag), None)
        if element is not None:
            items = [item.text or "" for item in element.iter(f"{{{_NAMESPACES['rdf']}}}li")]
            resource = element.get(f"{{{_NAMESPACES['rdf']}}}resource")
            found[name] = resource or "; ".join(items) or (element.text or "").strip()
        elif (holder := next((each for each in root.iter() if tag in each.attrib), None)) is not None:
            found[name] = holder.attrib[tag]
    return found


_STATEMENTS: Final = (
    *(("Iptc4xmpExt", "DigitalSourceType"), ("xmp", "CreatorTool"), ("Iptc4xmpExt", "AISystemUsed")),
    *(("Iptc4xmpExt", "AISystemVersionUsed"), ("Iptc4xmpExt", "AIPromptInformation")),
    *(("dc", "creator"), ("dc", "rights")),
)
