#![no_main]

use libfuzzer_sys::fuzz_target;
use tetris_store::SafetensorsSource;
use tetris_store_fuzz::{file_of, nowhere, use_all};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(source) = SafetensorsSource::from_file(file_of(bytes), nowhere()) {
        use_all(&source, bytes.len());
    }
});
