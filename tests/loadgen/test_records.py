import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.records import OUTCOMES, RequestRecord

instants = st.integers(min_value=0, max_value=2**62)
counts = st.integers(min_value=0, max_value=2**31)


@settings(deadline=None)
@given(
    st.builds(
        RequestRecord,
        id=counts,
        scheduled_ns=instants,
        sent_ns=st.none() | instants,
        first_token_ns=st.none() | instants,
        last_token_ns=st.none() | instants,
        prompt_tokens=counts,
        output_tokens_designed=counts,
        max_tokens=counts,
        output_tokens=counts,
        prompt_tokens_reported=st.none() | counts,
        outcome=st.sampled_from(OUTCOMES),
        status=st.none() | st.integers(100, 599),
        error=st.none() | st.text(),
    )
)
def test_records_survive_their_encoding_on_one_line(record):
    line = record.to_json()
    assert "\n" not in line
    assert RequestRecord.from_json(line) == record
    assert RequestRecord.from_json(line.encode()) == record


def test_a_record_with_an_unknown_field_is_refused():
    with pytest.raises(TypeError):
        RequestRecord.from_json(json.dumps({"id": 1, "surprise": 2}))
