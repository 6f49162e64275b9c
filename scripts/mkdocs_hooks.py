"""Links of the pages to files of the repository, which the site does not hold.

Pages link to files as they lie beside `docs/`, so that links work in the repository. On the site
such a link is a plain name, or leads to `repo_url` where mkdocs.yml names one.
"""

import os
import re

from mkdocs.exceptions import PluginError

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")


def on_page_markdown(markdown, page, config, files):
    """Replace links that lead out of the directory of the pages; refuse those that lead nowhere."""
    docs = config.docs_dir
    root = os.path.dirname(config.config_file_path)

    def replaced(match):
        text, target = match[2], match[3]
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = os.path.normpath(os.path.join(docs, os.path.dirname(page.file.src_uri), target))
        if path.startswith(docs + os.sep):
            return match[0]  # MkDocs checks these itself
        if not os.path.exists(path):
            raise PluginError(f"{page.file.src_uri}: {target} does not exist")
        name = os.path.relpath(path, root)
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{name})"
        return f'<span title="{name}">{text}</span>'

    return _LINK.sub(replaced, markdown)
