"""`GET /`: the chat page and the files that it consists of."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import FileResponse

FOLDER = Path(__file__).parents[1] / "page"
FILES = {"/": FOLDER / "index.html"} | {f"/{file.name}": file for file in sorted(FOLDER.iterdir())}
"""By path."""

# Whatever a model writes into the page, no script of its making runs there and nothing is fetched from elsewhere.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


async def _page(request: Request) -> FileResponse:
    return FileResponse(FILES[request.scope["path"]], headers=HEADERS)


for path in FILES:
    router.add_api_route(path, _page, methods=["GET", "HEAD"])
