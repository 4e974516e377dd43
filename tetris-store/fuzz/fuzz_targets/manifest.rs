#![no_main]

use libfuzzer_sys::fuzz_target;
use tetris_store::Manifest;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(manifest) = Manifest::decode(bytes) {
        // What was taken as a manifest survives being written again.
        let again = Manifest::decode(&manifest.encode()).unwrap();
        assert_eq!(again, manifest);
    }
});
