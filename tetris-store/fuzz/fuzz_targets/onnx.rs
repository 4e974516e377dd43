#![no_main]

use libfuzzer_sys::fuzz_target;
use tetris_store::OnnxSource;
use tetris_store_fuzz::{file_of, nowhere, use_all};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(source) = OnnxSource::from_file(file_of(bytes), nowhere()) {
        use_all(&source, bytes.len());
    }
});
