//! GGUF, versions 2 and 3: metadata, tensor descriptions, aligned data.
//!
//! The layout is the specification's (github.com/ggml-org/ggml, docs/gguf.md). Everything before
//! the data, which is all a loader needs besides the tensors, becomes the sidecar `header.gguf`.

use std::collections::HashSet;
use std::fs::File;
use std::path::Path;

use carlsbad_types::{DType, Shape};

use super::file::{ModelFile, Window};
use super::{MAX_NAME, MAX_TENSORS, ModelSource, SourceTensor, check_name, check_read};
use crate::element::{BlockType, ElementType};
use crate::error::Result;
use crate::manifest::{Sidecar, SourceFormat};

const FORMAT: &str = "GGUF";
pub(super) const MAGIC: &[u8] = b"GGUF";
/// The sidecar that is all of the file before its data.
pub(crate) const HEADER: &str = "header.gguf";
/// Vocabularies of 250,000 tokens take around 10 MB.
const MAX_HEADER: u64 = 128 << 20;
/// `GGML_MAX_DIMS`.
const MAX_RANK: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;
/// Arrays of arrays: allowed by the specification, used by nobody.
const MAX_DEPTH: usize = 8;
/// The specification's limit for a key is 2^16 - 1.
const MAX_KEY: u64 = 65_535;

/// A GGUF file.
#[derive(Debug)]
pub struct GgufSource {
    file: ModelFile,
    tensors: Vec<SourceTensor>,
    offsets: Vec<u64>,
    /// Length of everything before the data, without the padding.
    header: u64,
}

impl GgufSource {
    /// The model at `path`.
    ///
    /// # Errors
    /// [`Error::BadModel`](crate::Error::BadModel), [`Error::NotAFile`](crate::Error::NotAFile),
    /// [`Error::Io`](crate::Error::Io).
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_model_file(ModelFile::open(path)?)
    }

    /// The model in an open file. `path` is for messages.
    ///
    /// # Errors
    /// As [`GgufSource::open`].
    pub fn from_file(file: File, path: &Path) -> Result<Self> {
        Self::from_model_file(ModelFile::from_file(file, path)?)
    }

    pub(crate) fn from_model_file(file: ModelFile) -> Result<Self> {
        let (tensors, offsets, header) = Parser::new(&file).run()?;
        Ok(Self {
            file,
            tensors,
            offsets,
            header,
        })
    }
}

impl ModelSource for GgufSource {
    fn format(&self) -> SourceFormat {
        SourceFormat::Gguf
    }

    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn read_at(&self, index: usize, offset: u64, into: &mut [u8]) -> Result<()> {
        check_read(&self.tensors, index, offset, into, self.file.path())?;
        self.file.read_exact_at(self.offsets[index] + offset, into)
    }

    fn sidecars(&self) -> Result<Vec<Sidecar>> {
        Ok(vec![Sidecar {
            name: HEADER.to_owned(),
            bytes: self.file.read_vec(0, self.header)?,
        }])
    }
}

/// The element type of a `ggml_type`.
fn element(code: u32) -> Option<ElementType> {
    let dtype = match code {
        0 => DType::F32,
        1 => DType::F16,
        24 => DType::I8,
        25 => DType::I16,
        26 => DType::I32,
        27 => DType::I64,
        28 => DType::F64,
        30 => DType::BF16,
        _ => {
            let block = BlockType::ALL.iter().find(|block| block.code() == code)?;
            return Some(ElementType::Block(*block));
        }
    };
    Some(ElementType::Plain(dtype))
}

/// `gguf_metadata_value_type`.
const UINT32: u32 = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// Bytes of a metadata value of fixed size.
fn value_size(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        UINT32 | 5 | 6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

struct Parser<'a> {
    window: Window<'a>,
    at: u64,
}

impl<'a> Parser<'a> {
    fn new(file: &'a ModelFile) -> Self {
        Self {
            window: Window::new(file),
            at: 0,
        }
    }

    fn run(mut self) -> Result<(Vec<SourceTensor>, Vec<u64>, u64)> {
        if self.take::<4>()? != MAGIC {
            return Err(self.bad("it does not begin with `GGUF`"));
        }
        match self.u32()? {
            2 | 3 => {}
            1 => return Err(self.bad("version 1, which nobody writes since 2023: convert it")),
            // The version of a big-endian file, read as little-endian.
            version if matches!(version.swap_bytes(), 1..=3) => {
                return Err(self.bad("a big-endian file: convert it to little-endian"));
            }
            version => return Err(self.bad(format!("version {version}; known are 2 and 3"))),
        }
        let tensor_count = self.u64()?;
        let key_count = self.u64()?;
        if tensor_count > MAX_TENSORS as u64 {
            return Err(self.bad(format!("{tensor_count} tensors, over {MAX_TENSORS}")));
        }

        let mut alignment = DEFAULT_ALIGNMENT;
        for _ in 0..key_count {
            let key = self.string(MAX_KEY)?;
            let kind = self.u32()?;
            match key.as_slice() {
                b"general.alignment" => {
                    if kind != UINT32 {
                        return Err(self.bad("general.alignment is no uint32"));
                    }
                    alignment = u64::from(self.u32()?);
                    if !alignment.is_power_of_two() {
                        return Err(self.bad(format!("general.alignment is {alignment}")));
                    }
                }
                b"split.count" => {
                    let size = value_size(kind).filter(|size| *size <= 8);
                    let size = size.ok_or_else(|| self.bad("split.count is no number"))?;
                    let mut count = [0; 8];
                    let held = self.window.peek(self.at, size as usize)?.to_vec();
                    count[..held.len()].copy_from_slice(&held);
                    self.skip(size)?;
                    if u64::from_le_bytes(count) > 1 {
                        return Err(self.bad("one of several files: merge them first"));
                    }
                }
                _ => self.skip_value(kind, 0)?,
            }
        }

        let mut described = Vec::new();
        let mut names = HashSet::new();
        for _ in 0..tensor_count {
            let name = String::from_utf8(self.string(MAX_NAME as u64)?)
                .map_err(|_| self.bad("a tensor's name is not UTF-8"))?;
            check_name(&name).map_err(|why| self.bad(why))?;
            if !names.insert(name.clone()) {
                return Err(self.bad(format!("tensor `{name}` stands there twice")));
            }
            let rank = self.u32()?;
            if rank > MAX_RANK {
                return Err(self.bad(format!("tensor `{name}`: {rank} extents, over {MAX_RANK}")));
            }
            let mut extents = Vec::new();
            for _ in 0..rank {
                let extent = usize::try_from(self.u64()?);
                extents.push(extent.map_err(|why| self.bad(why.to_string()))?);
            }
            // ggml writes the innermost extent first.
            extents.reverse();
            let code = self.u32()?;
            let element = element(code)
                .ok_or_else(|| self.bad(format!("tensor `{name}`: unknown ggml type {code}")))?;
            let offset = self.u64()?;
            if offset % alignment != 0 {
                return Err(self.bad(format!(
                    "tensor `{name}`: its offset {offset} is no multiple of {alignment}"
                )));
            }
            let shape = Shape::from(extents);
            let len = element.byte_size(&shape)?.get();
            described.push((
                offset,
                SourceTensor {
                    name,
                    element,
                    shape,
                    len,
                },
            ));
        }

        let header = self.at;
        let held = self.window.file().len();
        let data = header
            .checked_next_multiple_of(alignment)
            .ok_or_else(|| self.bad("its data begins beyond its end"))?;
        described
            .sort_by(|(a_offset, a), (b_offset, b)| (a_offset, &a.name).cmp(&(b_offset, &b.name)));
        let mut tensors = Vec::with_capacity(described.len());
        let mut offsets = Vec::with_capacity(described.len());
        for (offset, tensor) in described {
            let start = data.checked_add(offset);
            let end = start.and_then(|start| start.checked_add(tensor.len));
            match (start, end) {
                (Some(start), Some(end)) if end <= held || tensor.len == 0 => offsets.push(start),
                _ => {
                    return Err(self.bad(format!(
                        "tensor `{}`: {} bytes at {offset} are beyond the end of the file",
                        tensor.name, tensor.len
                    )));
                }
            }
            tensors.push(tensor);
        }
        Ok((tensors, offsets, header))
    }

    fn bad(&self, why: impl Into<String>) -> crate::Error {
        self.window.file().bad(FORMAT, why)
    }

    fn skip(&mut self, len: u64) -> Result<()> {
        let file = self.window.file();
        match self.at.checked_add(len).filter(|end| *end <= file.len()) {
            Some(end) if end <= MAX_HEADER => {
                self.at = end;
                Ok(())
            }
            Some(_) => Err(self.bad("a header of more than 128 MiB")),
            None => Err(self.bad(format!("at byte {}: the file ends in its header", self.at))),
        }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let at = self.at;
        self.skip(N as u64)?;
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.window.peek(at, N)?);
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn string(&mut self, limit: u64) -> Result<Vec<u8>> {
        let len = self.u64()?;
        if len > limit {
            return Err(self.bad(format!(
                "a name of {len} bytes is over the limit of {limit}"
            )));
        }
        let at = self.at;
        self.skip(len)?;
        Ok(self.window.peek(at, len as usize)?.to_vec())
    }

    fn skip_value(&mut self, kind: u32, depth: usize) -> Result<()> {
        if let Some(size) = value_size(kind) {
            return self.skip(size);
        }
        match kind {
            STRING => {
                let len = self.u64()?;
                self.skip(len)
            }
            ARRAY if depth == MAX_DEPTH => Err(self.bad("arrays nested too deep")),
            ARRAY => {
                let kind = self.u32()?;
                let count = self.u64()?;
                if let Some(size) = value_size(kind) {
                    let bytes = count.checked_mul(size);
                    let bytes = bytes.ok_or_else(|| self.bad("an array beyond the file's end"))?;
                    return self.skip(bytes);
                }
                // Each of them takes at least 8 bytes of the file, so this ends with it.
                for _ in 0..count {
                    self.skip_value(kind, depth + 1)?;
                }
                Ok(())
            }
            _ => Err(self.bad(format!("unknown metadata type {kind}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone)]
    struct Gguf {
        version: u32,
        keys: Vec<(String, u32, Vec<u8>)>,
        tensors: Vec<(String, Vec<u64>, u32, u64)>,
        alignment: usize,
        data: Vec<u8>,
    }

    fn text(text: &str) -> Vec<u8> {
        let mut out = (text.len() as u64).to_le_bytes().to_vec();
        out.extend(text.as_bytes());
        out
    }

    impl Gguf {
        fn small() -> Self {
            let mut words = STRING.to_le_bytes().to_vec();
            words.extend(2u64.to_le_bytes());
            words.extend(text("a"));
            words.extend(text("bc"));
            Self {
                version: 3,
                keys: vec![
                    (
                        "general.alignment".into(),
                        UINT32,
                        64u32.to_le_bytes().to_vec(),
                    ),
                    ("tokens".into(), ARRAY, words),
                    ("x".into(), 12, 1.5f64.to_le_bytes().to_vec()),
                ],
                tensors: vec![
                    ("late".into(), vec![2], 0, 64),
                    ("early".into(), vec![32, 1], 2, 0),
                    ("empty".into(), vec![0, 3], 30, 0),
                ],
                alignment: 64,
                data: (0..72).collect(),
            }
        }

        fn bytes(&self) -> Vec<u8> {
            let mut out = MAGIC.to_vec();
            out.extend(self.version.to_le_bytes());
            out.extend((self.tensors.len() as u64).to_le_bytes());
            out.extend((self.keys.len() as u64).to_le_bytes());
            for (key, kind, value) in &self.keys {
                out.extend(text(key));
                out.extend(kind.to_le_bytes());
                out.extend(value);
            }
            for (name, extents, code, offset) in &self.tensors {
                out.extend(text(name));
                out.extend((extents.len() as u32).to_le_bytes());
                out.extend(extents.iter().flat_map(|extent| extent.to_le_bytes()));
                out.extend(code.to_le_bytes());
                out.extend(offset.to_le_bytes());
            }
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&self.data);
            out
        }

        fn open(&self) -> Result<GgufSource> {
            open(&self.bytes())
        }
    }

    fn open(bytes: &[u8]) -> Result<GgufSource> {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, bytes).unwrap();
        GgufSource::from_file(file, Path::new("model.gguf"))
    }

    #[test]
    fn reads_what_the_specification_describes() {
        let gguf = Gguf::small();
        let source = gguf.open().unwrap();
        let names: Vec<&str> = source.tensors().iter().map(|t| t.name.as_str()).collect();
        assert_eq!(names, ["early", "empty", "late"]);
        let early = &source.tensors()[0];
        assert_eq!(early.element, ElementType::Block(BlockType::Q4_0));
        assert_eq!((early.shape.dims(), early.len), (&[1, 32][..], 18));
        let mut late = [0; 8];
        source.read_at(2, 0, &mut late).unwrap();
        assert_eq!(late, [64, 65, 66, 67, 68, 69, 70, 71]);
        assert!(source.read_at(2, 1, &mut late).is_err());
        assert!(source.read_at(3, 0, &mut late).is_err());
        // The sidecar and the tensors are the file again.
        let mut again = source.sidecars().unwrap()[0].bytes.clone();
        again.resize(again.len().next_multiple_of(64), 0);
        again.extend(&gguf.data);
        assert_eq!(again, gguf.bytes());
        assert!(open(&Gguf { version: 2, ..gguf }.bytes()).is_ok());
    }

    #[test]
    fn what_lies_is_refused() {
        let small = Gguf::small();
        let with = |change: &dyn Fn(&mut Gguf)| {
            let mut gguf = small.clone();
            change(&mut gguf);
            gguf
        };
        let key = |key: &str, kind: u32, value: &[u8]| (key.to_owned(), kind, value.to_vec());
        let mut deep = Vec::new();
        for _ in 0..100 {
            deep.extend(ARRAY.to_le_bytes());
            deep.extend(1u64.to_le_bytes());
        }
        let many = [&STRING.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat();
        let wide = [&12u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat();
        for (what, bad) in [
            ("version", with(&|g| g.version = 1)),
            ("big-endian", with(&|g| g.version = 3u32.swap_bytes())),
            ("twice", with(&|g| g.tensors[0].0 = "early".into())),
            ("unaligned", with(&|g| g.tensors[0].3 = 4)),
            ("beyond", with(&|g| g.tensors[0].3 = 128)),
            ("overflow", with(&|g| g.tensors[0].3 = u64::MAX - 63)),
            ("shape", with(&|g| g.tensors[0].1 = vec![1 << 40, 1 << 40])),
            ("block", with(&|g| g.tensors[1].1 = vec![31])),
            ("rank", with(&|g| g.tensors[0].1 = vec![1; 5])),
            ("type", with(&|g| g.tensors[0].2 = 4)),
            ("name", with(&|g| g.tensors[0].0 = "a\0".into())),
            ("long", with(&|g| g.tensors[0].0 = "n".repeat(5000))),
            ("alignment", with(&|g| g.keys[0].2 = vec![0; 4])),
            ("odd", with(&|g| g.keys[0].2 = 3u32.to_le_bytes().to_vec())),
            ("kind", with(&|g| g.keys.push(key("k", 13, &[])))),
            ("deep", with(&|g| g.keys.push(key("k", ARRAY, &deep)))),
            ("many", with(&|g| g.keys.push(key("k", ARRAY, &many)))),
            ("wide", with(&|g| g.keys.push(key("k", ARRAY, &wide)))),
            (
                "string",
                with(&|g| g.keys.push(key("k", STRING, &u64::MAX.to_le_bytes()))),
            ),
            (
                "split",
                with(&|g| g.keys.push(key("split.count", 2, &[2, 0]))),
            ),
        ] {
            assert!(bad.open().is_err(), "{what}");
        }
        let bytes = small.bytes();
        for cut in 0..bytes.len() {
            assert!(open(&bytes[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn every_ggml_type_has_one_code() {
        let mut codes = HashSet::new();
        for code in 0..64 {
            if let Some(element) = element(code) {
                assert!(codes.insert(element.name()), "{element}");
            }
        }
        assert_eq!(codes.len(), 8 + BlockType::ALL.len());
    }
}
