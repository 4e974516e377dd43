//! What the tests and benches of the Carlsbad crates share.
