"""What the tests of generation share."""

from tests.evaluation.conftest import data as data
from tests.evaluation.workdirs import decoder as decoder
from tests.evaluation.workdirs import encoder_decoder as encoder_decoder
