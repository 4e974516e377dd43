//! The decoder of the TCP fabric's frames: any bytes, and what they decode to encodes to the same
//! again.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| krcore::fuzz_frames(bytes));
