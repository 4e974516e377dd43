#![no_main]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tetris_store::SafetensorsSource;
use tetris_store_fuzz::use_all;

const HEADER: &str = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"F16","shape":[],"data_offsets":[4,6]}}"#;

/// A folder with two shards, whose index is what is fuzzed.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let name = format!("target/index_json-{}", std::process::id());
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    fs::create_dir_all(&folder).unwrap();
    let mut shard = (HEADER.len() as u64).to_le_bytes().to_vec();
    shard.extend(HEADER.as_bytes());
    shard.extend([1, 2, 3, 4, 5, 6]);
    fs::write(folder.join("x"), &shard).unwrap();
    fs::write(folder.join("y"), &shard).unwrap();
    folder
});

fuzz_target!(|bytes: &[u8]| {
    fs::write(FOLDER.join("model.safetensors.index.json"), bytes).unwrap();
    if let Ok(source) = SafetensorsSource::open(&FOLDER) {
        use_all(&source, 4096 + bytes.len());
    }
});
