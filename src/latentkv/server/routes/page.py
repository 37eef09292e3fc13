"""`GET /`: the chat page, and the files that it consists of."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

PAGE = Path(__file__).parents[1] / "page"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


def _serve(path: str, file: str) -> None:
    async def page() -> Response:
        return FileResponse(PAGE / file, headers=HEADERS)

    router.add_api_route(path, page, methods=["GET", "HEAD"])
