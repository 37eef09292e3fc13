"""Pages as files of a folder: who finds them (`page_store`), what one holds (`page_file`), whose it is (`page_key`)."""

from latentkv.state.store.folder import StoreFolder
from latentkv.state.store.page_key import PageKey
from latentkv.state.store.page_store import PageStore

__all__ = ["PageKey", "PageStore", "StoreFolder"]
