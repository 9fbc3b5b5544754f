"""Pages as a browser would parse them."""

from html.parser import HTMLParser


class Parsed(HTMLParser):
    """The tags of a page and the text outside of <style>."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.text, self.style = [], [], "", False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.style = tag == "style"

    def handle_data(self, data):
        self.text += "" if self.style else data

    def handle_endtag(self, tag):
        self.style = False


def needs_nothing(html: str) -> Parsed:
    """Assert that a page loads nothing and runs nothing."""
    page = Parsed(html)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        assert name != "src" or value.startswith("data:image/"), value
        assert name != "href" or value.startswith("#"), value
        assert name != "style" or "url" not in value, value
    assert "@import" not in html and "url(" not in html
    assert any("default-src 'none'" in (value or "") for _, value in page.attributes)
    return page
