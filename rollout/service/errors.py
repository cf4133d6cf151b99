"""What went wrong, in the form of OpenAI's API: a status of HTTP and a JSON object."""

from http import HTTPStatus

import msgspec
from msgspec import Struct


class ErrorFields(Struct, frozen=True, kw_only=True):
    """message: one line for a person. type: a word for a program. param: the field that is wrong. code: HTTP's."""

    message: str
    type: str
    param: str | None = None
    code: int


class ErrorBody(Struct, frozen=True, kw_only=True):
    error: ErrorFields


class ServiceError(Exception):
    """A request that is not answered as it was meant."""

    def __init__(self, status: int, message: str, param: str | None = None, type: str = "") -> None:
        """Args: type: by default after the status, `BadRequestError` and so on."""
        super().__init__(message)
        phrase = HTTPStatus(status).phrase.title().replace(" ", "").replace("-", "")
        self.status = status
        self.fields = ErrorFields(message=message, type=type or f"{phrase}Error", param=param, code=status)

    def body(self) -> bytes:
        return msgspec.json.encode(ErrorBody(error=self.fields))
