"""The feature store: what a dictionary's latents do on text, and what people and models say of them.

`open_store(address)` reads and adds; `build_store(...)` makes a new one. The only package that knows SQL.
"""

from data.store.build import BuildOptions as BuildOptions
from data.store.build import build_store as build_store
from data.store.errors import StoreError as StoreError
from data.store.files import store_folder as store_folder
from data.store.open import Store as Store
from data.store.open import open_store as open_store
from data.store.schema import DETECTION as DETECTION
from data.store.schema import POLES as POLES
from data.store.schema import QUANTILES as QUANTILES
from data.store.schema import SOURCES as SOURCES
from data.store.schema import Coactive as Coactive
from data.store.schema import Example as Example
from data.store.schema import Explanation as Explanation
from data.store.schema import Feature as Feature
from data.store.schema import FeatureRow as FeatureRow
from data.store.schema import LossEffect as LossEffect
from data.store.schema import Map as Map
from data.store.schema import Neighbour as Neighbour
from data.store.schema import Page as Page
from data.store.schema import PositionBin as PositionBin
from data.store.schema import Profile as Profile
from data.store.schema import Score as Score
from data.store.schema import Summary as Summary
from data.store.schema import TokenCount as TokenCount
from data.store.schema import TokenValue as TokenValue
from data.store.schema import Window as Window
from data.store.search import Facts as Facts
from data.store.search import Filters as Filters
