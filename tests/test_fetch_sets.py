"""Data sets out of packages: what their files become."""

from fsdp_qlora import fetch_sets
from fsdp_qlora.data import row_formats

DIALOGUES = """
categories:
- science
conversations:
- - What is light?
  - A wave, and a particle.
  - Both?
- - Only asked
- - 7
  - is no text
"""
BROWN = """
\tThe/at Fulton/np-tl County/nn-tl jury/nn said/vbd Ivan/np Allen/np Jr./np and/cc Pye's/np$ \
aide/nn (/( Ed/np )/) left/vbd ./.

\tNo/at evidence/nn ''/'' ./.
"""


def test_a_conversation_becomes_description_patient_and_doctor():
    assert list(fetch_sets.dialogues(DIALOGUES)) == [
        {"Description": "science", "Patient": "What is light?", "Doctor": "A wave, and a particle."}
    ]


def test_tagged_words_become_a_sentence_and_its_names():
    """Names of several words are joined; sentences without one are left out."""
    (row,) = fetch_sets.names(BROWN)
    assert row == {
        "text": "The Fulton County jury said Ivan Allen Jr. and Pye's aide (Ed) left.",
        "label": {"name": ["Fulton", "Ivan Allen Jr.", "Pye", "Ed"]},
    }
    assert row_formats.problem(row) is None and row_formats.match(row).name == "label"
