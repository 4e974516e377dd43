//! What a model file may say, and what it must not get away with. Every refusal is a typed error:
//! no panic, no hang, no memory beyond what the file itself takes.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use prost::encoding::{WireType, encode_key, encode_varint};
use tetris_store::{
    Error, ModelSource, SafetensorsSource, SourceFormat, open_model, open_model_from,
};

fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

fn two_tensors() -> Vec<u8> {
    safetensors(
        r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"I16","shape":[2],"data_offsets":[8,12]},
            "a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},
            "none":{"dtype":"F64","shape":[0,9],"data_offsets":[8,8]},
            "scalar":{"dtype":"U8","shape":[],"data_offsets":[12,13]}}"#,
        &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13],
    )
}

/// A field of a protobuf message.
fn field(number: u32, bytes: &[u8], into: &mut Vec<u8>) {
    encode_key(number, WireType::LengthDelimited, into);
    encode_varint(bytes.len() as u64, into);
    into.extend(bytes);
}

fn varint_field(number: u32, value: u64, into: &mut Vec<u8>) {
    encode_key(number, WireType::Varint, into);
    encode_varint(value, into);
}

/// An ONNX model with one tensor of four bytes, inside or at `location`.
fn onnx(location: Option<&str>) -> Vec<u8> {
    let mut tensor = Vec::new();
    varint_field(1, 1, &mut tensor);
    varint_field(2, 1, &mut tensor);
    field(8, b"w", &mut tensor);
    match location {
        None => field(9, &[1, 2, 3, 4], &mut tensor),
        Some(location) => {
            let mut entry = Vec::new();
            field(1, b"location", &mut entry);
            field(2, location.as_bytes(), &mut entry);
            field(13, &entry, &mut tensor);
            varint_field(14, 1, &mut tensor);
        }
    }
    let mut graph = Vec::new();
    field(5, &tensor, &mut graph);
    let mut model = Vec::new();
    varint_field(1, 8, &mut model);
    field(7, &graph, &mut model);
    model
}

fn gguf() -> Vec<u8> {
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend(1u64.to_le_bytes());
    file.extend(1u64.to_le_bytes());
    for word in ["k", "v"] {
        file.extend(1u64.to_le_bytes());
        file.extend(word.as_bytes());
        if word == "k" {
            file.extend(8u32.to_le_bytes());
        }
    }
    file.extend(1u64.to_le_bytes());
    file.extend(b"t");
    file.extend(1u32.to_le_bytes());
    file.extend(32u64.to_le_bytes());
    file.extend(2u32.to_le_bytes());
    file.extend(0u64.to_le_bytes());
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend([7; 18]);
    file
}

fn open(bytes: &[u8]) -> Result<Box<dyn ModelSource>, Error> {
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, bytes).unwrap();
    open_model_from(file, Path::new("model"))
}

fn read(source: &dyn ModelSource, name: &str) -> Vec<u8> {
    let index = source
        .tensors()
        .iter()
        .position(|t| t.name == name)
        .unwrap();
    let mut bytes = vec![0; source.tensors()[index].len as usize];
    source.read_at(index, 0, &mut bytes).unwrap();
    bytes
}

/// Opens, and reads everything that a source offers.
fn use_all(bytes: &[u8]) {
    if let Ok(source) = open(bytes) {
        for (index, tensor) in source.tensors().iter().enumerate() {
            assert_eq!(
                tensor.element.byte_size(&tensor.shape).unwrap().get(),
                tensor.len
            );
            assert!(tensor.len <= bytes.len() as u64 * 8);
            let mut data = vec![0; tensor.len as usize];
            source.read_at(index, 0, &mut data).unwrap();
            assert!(source.read_at(index, 1, &mut data).is_err() || data.is_empty());
        }
        let sidecars = source.sidecars().unwrap();
        let kept: usize = sidecars.iter().map(|sidecar| sidecar.bytes.len()).sum();
        assert!(kept <= bytes.len() * 2 + 64);
    }
}

#[test]
fn a_format_is_told_by_its_content() {
    let source = open(&two_tensors()).unwrap();
    assert_eq!(source.format(), SourceFormat::Safetensors);
    assert_eq!(open(&onnx(None)).unwrap().format(), SourceFormat::Onnx);
    assert_eq!(open(&gguf()).unwrap().format(), SourceFormat::Gguf);
    for bytes in [&b""[..], b"x", b"#!/bin/sh\n", &[0; 4096], &[255; 4096]] {
        assert!(open(bytes).is_err());
    }
}

#[test]
fn zero_size_and_scalar_tensors_at_unaligned_places() {
    let source = open(&two_tensors()).unwrap();
    let names: Vec<&str> = source.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["a", "none", "b", "scalar"]);
    assert_eq!(read(&*source, "a"), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(read(&*source, "b"), [9, 10, 11, 12]);
    assert_eq!(read(&*source, "scalar"), [13]);
    assert!(read(&*source, "none").is_empty());
    assert!(source.tensors()[3].shape.dims().is_empty());
}

#[test]
fn hostile_headers_are_refused() {
    let one = |info: &str| safetensors(&format!(r#"{{"a":{info}}}"#), &[0; 8]);
    let endless = "1,".repeat(100);
    let cases = [
        (
            "offsets overflow",
            one(
                r#"{"dtype":"F32","shape":[2],"data_offsets":[18446744073709551608,18446744073709551615]}"#,
            ),
        ),
        (
            "offsets beyond",
            one(r#"{"dtype":"F32","shape":[4],"data_offsets":[0,16]}"#),
        ),
        (
            "offsets backwards",
            one(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#),
        ),
        (
            "a hole",
            one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#),
        ),
        (
            "bytes left over",
            one(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#),
        ),
        (
            "shape overflows",
            one(r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}"#),
        ),
        (
            "shape and bytes differ",
            one(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#),
        ),
        (
            "negative",
            one(r#"{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}"#),
        ),
        (
            "endless shape",
            one(&format!(
                r#"{{"dtype":"F64","shape":[{endless}1],"data_offsets":[0,8]}}"#
            )),
        ),
        (
            "unknown type",
            one(r#"{"dtype":"Q9","shape":[8],"data_offsets":[0,8]}"#),
        ),
        (
            "half a byte",
            one(r#"{"dtype":"F4","shape":[16],"data_offsets":[0,8]}"#),
        ),
        ("deep", one(&"[".repeat(100_000))),
        (
            "twice",
            safetensors(
                r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#,
                &[0; 8],
            ),
        ),
        (
            "metadata twice",
            safetensors(r#"{"__metadata__":{},"__metadata__":{}}"#, &[]),
        ),
        (
            "NUL",
            safetensors(
                "{\"a\\u0000\":{\"dtype\":\"U8\",\"shape\":[8],\"data_offsets\":[0,8]}}",
                &[0; 8],
            ),
        ),
        (
            "no name",
            safetensors(
                r#"{"":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#,
                &[0; 8],
            ),
        ),
        (
            "huge name",
            safetensors(
                &format!(
                    r#"{{"{}":{{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}}}"#,
                    "n".repeat(70_000)
                ),
                &[0; 8],
            ),
        ),
        ("not UTF-8", {
            let mut bytes = two_tensors();
            bytes[10] = 0xff;
            bytes
        }),
        ("no object", safetensors("[]", &[])),
    ];
    for (what, bytes) in cases {
        match open(&bytes) {
            Err(Error::BadModel { .. } | Error::NotAModel { .. }) => {}
            Err(other) => panic!("{what}: {other}"),
            Ok(source) => panic!("{what}: {:?}", source.tensors()),
        }
    }
}

#[test]
fn a_header_of_100_mb_costs_no_more_than_the_file() {
    // Lies about its length.
    let mut lie = two_tensors();
    lie[..8].copy_from_slice(&100_000_000u64.to_le_bytes());
    assert!(matches!(open(&lie), Err(Error::BadModel { .. })));
    lie[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(open(&lie).is_err());
    // Is as long as it says, a hole on disk: refused at its first byte.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let mut file = 100_000_000u64.to_le_bytes().to_vec();
    file.push(b'{');
    fs::write(&path, file).unwrap();
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(200_000_000)
        .unwrap();
    assert!(matches!(open_model(&path), Err(Error::BadModel { .. })));
    fs::write(&path, 100_000_001u64.to_le_bytes()).unwrap();
    assert!(matches!(
        SafetensorsSource::open(&path),
        Err(Error::BadModel { .. })
    ));
}

#[test]
fn truncated_files_are_refused() {
    for whole in [two_tensors(), onnx(None), gguf()] {
        assert!(open(&whole).is_ok());
        for cut in 0..whole.len() {
            assert!(open(&whole[..cut]).is_err(), "{cut} of {}", whole.len());
        }
    }
}

#[test]
fn a_file_that_shrinks_later_is_an_error_and_no_signal() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    fs::write(&path, two_tensors()).unwrap();
    let source = open_model(&path).unwrap();
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(20)
        .unwrap();
    let mut bytes = [0; 8];
    assert!(matches!(
        source.read_at(0, 0, &mut bytes),
        Err(Error::Io { .. })
    ));
}

#[test]
fn what_is_no_file_does_not_hang() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("model.safetensors");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(matches!(open_model(&fifo), Err(Error::NotAFile { .. })));
    assert!(matches!(
        open_model(dir.path()),
        Err(Error::NotAFile { .. })
    ));
    assert!(matches!(
        open_model(Path::new("/dev/zero")),
        Err(Error::NotAFile { .. })
    ));
    fs::remove_file(&fifo).unwrap();
    assert!(matches!(
        open_model(dir.path()),
        Err(Error::NotAModel { .. })
    ));
}

/// A model's folder beside a secret that it must not read: `(folder, model, secret)`.
fn beside_a_secret() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    let secret = dir.path().join("secret");
    fs::write(&secret, two_tensors()).unwrap();
    symlink("../secret", model.join("link")).unwrap();
    symlink(&secret, model.join("absolute-link")).unwrap();
    symlink("..", model.join("up")).unwrap();
    (dir, model, secret)
}

fn locations(secret: &Path) -> Vec<String> {
    let mut locations: Vec<String> = [
        "../secret",
        "./../secret",
        "x/../../secret",
        "link",
        "absolute-link",
        "up/secret",
        "..",
        "",
    ]
    .map(str::to_owned)
    .to_vec();
    locations.push(secret.display().to_string());
    locations.push("a".repeat(100_000));
    locations.push("a\0b".to_owned());
    locations
}

#[test]
fn path_traversal_in_onnx_location_is_refused() {
    let (_dir, model, secret) = beside_a_secret();
    let path = model.join("model.onnx");
    for location in locations(&secret) {
        fs::write(&path, onnx(Some(&location))).unwrap();
        let refused = open_model(&path);
        let typed = matches!(
            refused,
            Err(Error::OutsideModel { .. } | Error::BadModel { .. })
        );
        assert!(typed, "{location:.50}: {:?}", refused.err());
    }
    // The control: the same bytes inside the folder are read.
    fs::create_dir(model.join("sub")).unwrap();
    fs::write(model.join("sub/weights"), [9; 4]).unwrap();
    fs::write(&path, onnx(Some("./sub/weights"))).unwrap();
    assert_eq!(read(&*open_model(&path).unwrap(), "w"), [9; 4]);
    // From an open file alone there is no folder to look in.
    let file = fs::File::open(&path).unwrap();
    assert!(open_model_from(file, &path).is_err());
    fs::write(model.join("sub/weights"), [9; 3]).unwrap();
    assert!(matches!(open_model(&path), Err(Error::BadModel { .. })));
}

#[test]
fn path_traversal_in_index_json_is_refused() {
    let (_dir, model, secret) = beside_a_secret();
    let index = model.join("model.safetensors.index.json");
    let of = |location: &str| serde_json::json!({"weight_map": {"a": location}}).to_string();
    for location in locations(&secret) {
        fs::write(&index, of(&location)).unwrap();
        let refused = open_model(&model);
        assert!(
            matches!(refused, Err(Error::OutsideModel { .. })),
            "{:?}",
            refused.err()
        );
    }
    fs::write(model.join("part"), two_tensors()).unwrap();
    fs::write(&index, of("part")).unwrap();
    let source = open_model(&model).unwrap();
    assert_eq!(source.tensors().len(), 1, "only what the index lists");
    for bad in [
        r#"{"weight_map":{"absent":"part"}}"#,
        r#"{"weight_map":{"a":"part","a":"part"}}"#,
        r#"{"weight_map":{"a":7}}"#,
        r#"{"weight_map":[]}"#,
        r"{}",
        "",
    ] {
        fs::write(&index, bad).unwrap();
        assert!(
            matches!(open_model(&model), Err(Error::BadModel { .. })),
            "{bad}"
        );
    }
}

#[test]
fn a_folder_brings_its_small_files() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    fs::write(folder.join("model.safetensors"), two_tensors()).unwrap();
    fs::write(folder.join("config.json"), "{}").unwrap();
    fs::write(folder.join("vocab.txt"), "a\nb").unwrap();
    fs::write(folder.join("pytorch_model.bin"), "not carried").unwrap();
    fs::create_dir(folder.join("folder.json")).unwrap();
    let names = |folder: &Path| -> Vec<String> {
        let sidecars = open_model(folder).unwrap().sidecars().unwrap();
        sidecars.into_iter().map(|sidecar| sidecar.name).collect()
    };
    assert_eq!(
        names(folder),
        ["__metadata__.json", "config.json", "vocab.txt"]
    );
    symlink("/etc/hostname", folder.join("tokenizer.json")).unwrap();
    let refused = open_model(folder).unwrap().sidecars();
    assert!(matches!(refused, Err(Error::OutsideModel { .. })));
}

fn mutated(original: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let len = original.len();
    let edit = (0..len, any::<u8>(), 0u8..4);
    proptest::collection::vec(edit, 1..6).prop_map(move |edits| {
        let mut bytes = original.clone();
        for (at, value, kind) in edits {
            let at = at % bytes.len().max(1);
            match kind {
                0 => bytes[at] = value,
                1 => bytes[at] ^= 1 << (value & 7),
                2 => bytes.insert(at, value),
                _ if bytes.len() > 1 => drop(bytes.remove(at)),
                _ => {}
            }
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn a_mutated_safetensors_file_never_panics(bytes in mutated(two_tensors())) {
        use_all(&bytes);
    }

    #[test]
    fn a_mutated_onnx_file_never_panics(bytes in mutated(onnx(None))) {
        use_all(&bytes);
    }

    #[test]
    fn a_mutated_gguf_file_never_panics(bytes in mutated(gguf())) {
        use_all(&bytes);
    }

    #[test]
    fn any_bytes_never_panic(start in 0usize..4, bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let magic: &[u8] = [&b"GGUF\x03\0\0\0"[..], &[8, 8, 0x3a], &[40, 0, 0, 0, 0, 0, 0, 0, b'{'], &[]][start];
        use_all(&[magic, &bytes].concat());
    }
}
