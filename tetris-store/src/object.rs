//! The format of a stored file, which is a safetensors file.
//!
//! 8 bytes of header length, a JSON header padded with spaces so that the data begins at a multiple
//! of 4,096 bytes, then the data without holes (the format allows none). A large tensor has a file
//! of its own; the small ones of a model share a *pack*. Element types that safetensors does not
//! know are declared as bytes, their real type and shape standing in `__metadata__`, so that every
//! file can be checked by itself.

use std::cmp::Ordering;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use carlsbad_types::{DType, Shape};
use serde_json::{Map, Value, json};

use crate::element::ElementType;
use crate::error::{Error, Result};

/// Where data may begin: multiples of the page size of x86-64 and most arm64 kernels.
pub(crate) const DATA_ALIGNMENT: u64 = 4096;

/// Where the data of a file with a single tensor always begins.
pub(crate) const SINGLE_DATA_OFFSET: u64 = DATA_ALIGNMENT;

/// Tensors below this size share a file: an inode and a partly filled last page cost some 5 KiB.
pub(crate) const PACKED_BELOW: u64 = 64 << 10;

/// A pack is assembled in memory, and is closed before it outgrows this.
pub(crate) const PACK_LIMIT: u64 = 16 << 20;

/// The largest header that safetensors readers accept.
const HEADER_LIMIT: u64 = 100_000_000;

/// Stands for a tensor's name where a header has no room for it.
const NAMELESS: &str = "tensor";

/// Metadata keys that carry the real type of tensors declared as bytes.
const BLOCK_PREFIX: &str = "tetris-store block ";

/// A tensor in a stored file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Member {
    /// Its name in the file.
    pub(crate) name: String,
    /// Its element type.
    pub(crate) element: ElementType,
    /// Its extents.
    pub(crate) shape: Shape,
    /// Its size in bytes.
    pub(crate) len: u64,
}

/// The order of a pack: by alignment, widest first, so that dense packing keeps every tensor
/// aligned; then by name.
pub(crate) fn pack_order(a: (ElementType, &str), b: (ElementType, &str)) -> Ordering {
    let alignment = b.0.alignment().cmp(&a.0.alignment());
    alignment.then_with(|| a.1.cmp(b.1))
}

/// The first [`SINGLE_DATA_OFFSET`] bytes of a file that holds `member` alone. A name that does not
/// fit is replaced: the identity of a tensor has no name in it.
pub(crate) fn single_header(member: &Member) -> Vec<u8> {
    let mut member = member.clone();
    let header = header(std::slice::from_ref(&member));
    if header.len() as u64 == SINGLE_DATA_OFFSET && member.name != "__metadata__" {
        return header;
    }
    member.name = NAMELESS.to_owned();
    self::header(&[member])
}

/// Header length and header of a file that holds `members` in this order, padded up to the data.
pub(crate) fn header(members: &[Member]) -> Vec<u8> {
    let mut metadata = Map::new();
    // Hugging Face's loaders refuse files that do not say which framework they are for.
    metadata.insert("format".into(), json!("pt"));
    let mut entries = Map::new();
    let mut begin = 0;
    for member in members {
        let end = begin + member.len;
        let offsets = [begin, end];
        let entry = match member.element {
            ElementType::Plain(dtype) => {
                json!({"dtype": dtype.name(), "shape": member.shape.dims(), "data_offsets": offsets})
            }
            ElementType::Block(block) => {
                let real = json!({"element": block.name(), "shape": member.shape.dims()});
                metadata.insert(
                    format!("{BLOCK_PREFIX}{}", member.name),
                    json!(real.to_string()),
                );
                json!({"dtype": DType::U8.name(), "shape": [member.len], "data_offsets": offsets})
            }
        };
        entries.insert(member.name.clone(), entry);
        begin = end;
    }
    entries.insert("__metadata__".into(), Value::Object(metadata));

    let json = Value::Object(entries).to_string();
    let total = (8 + json.len() as u64).next_multiple_of(DATA_ALIGNMENT);
    let mut bytes = Vec::with_capacity(total as usize);
    bytes.extend_from_slice(&(total - 8).to_le_bytes());
    bytes.extend_from_slice(json.as_bytes());
    bytes.resize(total as usize, b' ');
    bytes
}

/// What a stored file declares: where its data begins, and its tensors in the order of the data.
///
/// # Errors
/// [`Error::Damaged`] where it is no stored file; [`Error::Io`].
pub(crate) fn read_header(file: &File, path: &Path) -> Result<(u64, Vec<Member>)> {
    let damaged = |why: &str| Error::Damaged {
        path: path.to_owned(),
        why: why.to_owned(),
    };
    let size = file.metadata().map_err(Error::io("read", path))?.len();
    if size < 8 {
        return Err(damaged("it is shorter than a header"));
    }
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0)
        .map_err(Error::io("read", path))?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_LIMIT || length > size - 8 {
        return Err(damaged("its header is longer than the file"));
    }
    let data = 8 + length;
    if data % DATA_ALIGNMENT != 0 {
        return Err(damaged("its data is not aligned"));
    }
    let mut json = vec![0; length as usize];
    file.read_exact_at(&mut json, 8)
        .map_err(Error::io("read", path))?;
    let members =
        parse_members(&json, size - data).ok_or_else(|| damaged("its header is malformed"))?;
    Ok((data, members))
}

fn parse_members(json: &[u8], data_len: u64) -> Option<Vec<Member>> {
    let mut entries: Map<String, Value> = serde_json::from_slice(json).ok()?;
    let metadata = entries.remove("__metadata__")?;
    let mut placed = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        let offsets: [u64; 2] = serde_json::from_value(entry.get("data_offsets")?.clone()).ok()?;
        let len = offsets[1].checked_sub(offsets[0])?;
        let (element, shape) = match metadata.get(format!("{BLOCK_PREFIX}{name}")) {
            Some(real) => {
                let real: Value = serde_json::from_str(real.as_str()?).ok()?;
                (
                    real.get("element")?.as_str()?.to_owned(),
                    real.get("shape")?.clone(),
                )
            }
            None => (
                entry.get("dtype")?.as_str()?.to_owned(),
                entry.get("shape")?.clone(),
            ),
        };
        let element = ElementType::from_name(&element)?;
        let shape: Shape = serde_json::from_value(shape).ok()?;
        if element.byte_size(&shape).ok()?.get() != len {
            return None;
        }
        placed.push((
            offsets,
            Member {
                name,
                element,
                shape,
                len,
            },
        ));
    }
    placed.sort_by(|a, b| {
        let by_offset = a.0.cmp(&b.0);
        by_offset.then_with(|| pack_order((a.1.element, &a.1.name), (b.1.element, &b.1.name)))
    });
    let mut end = 0;
    for (offsets, _) in &placed {
        if offsets[0] != end {
            return None;
        }
        end = offsets[1];
    }
    (end == data_len).then(|| placed.into_iter().map(|(_, member)| member).collect())
}
