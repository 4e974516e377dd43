//! Safetensors: one file, or several with a Hugging Face index.
//!
//! The format: an 8-byte little-endian header length, a JSON header, and the tensors' bytes without
//! holes (github.com/huggingface/safetensors). The header of a file and the rules of its offsets
//! are checked by the `safetensors` crate; what it leaves open is checked here: a name twice, an
//! endless shape, what the file really holds.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::path::Path;

use carlsbad_types::{DType, Shape};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::file::{ModelFile, ModelFolder};
use super::{MAX_TENSORS, ModelSource, SourceTensor, check_name, check_read};
use crate::element::ElementType;
use crate::error::{Error, Result};
use crate::manifest::{Sidecar, SourceFormat};

const FORMAT: &str = "safetensors";
/// The format's own limit for a header.
const MAX_HEADER: u64 = 100_000_000;
const MAX_INDEX: u64 = 64 << 20;
/// More extents than any framework makes; keeps a hostile header's memory in proportion.
const MAX_RANK: usize = 64;
/// Largest tokenizer files in use are around 35 MB.
const MAX_SIDECAR: u64 = 64 << 20;
const MAX_SIDECARS: u64 = 256 << 20;

/// The index of a model in several files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// The one file of a model that needs no index.
const SINGLE: &str = "model.safetensors";
/// The sidecar that keeps the free-form `__metadata__` of the header.
pub(crate) const METADATA: &str = "__metadata__.json";
/// What belongs to a model in a Hugging Face folder besides its weights: configuration,
/// vocabulary, merges, SentencePiece models, chat templates.
const SIDECAR_EXTENSIONS: [&str; 4] = ["json", "txt", "model", "jinja"];

/// A model in safetensors files.
#[derive(Debug)]
pub struct SafetensorsSource {
    files: Vec<ModelFile>,
    tensors: Vec<SourceTensor>,
    /// File and offset of each tensor.
    places: Vec<(usize, u64)>,
    metadata: BTreeMap<String, String>,
    folder: Option<ModelFolder>,
}

impl SafetensorsSource {
    /// The model at `path`: a file, or a folder that has `model.safetensors.index.json` or
    /// `model.safetensors`. A folder's configuration and tokenizer files (`.json`, `.txt`,
    /// `.model`, `.jinja`) become sidecars.
    ///
    /// # Errors
    /// [`Error::BadModel`], [`Error::OutsideModel`] where an index names a file outside the folder,
    /// [`Error::NotAFile`], [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            Self::open_folder(ModelFolder::open(path)?)
        } else {
            Self::from_model_file(ModelFile::open(path)?)
        }
    }

    /// The model in an open file. `path` is for messages.
    ///
    /// # Errors
    /// As [`SafetensorsSource::open`].
    pub fn from_file(file: File, path: &Path) -> Result<Self> {
        Self::from_model_file(ModelFile::from_file(file, path)?)
    }

    pub(crate) fn from_model_file(file: ModelFile) -> Result<Self> {
        let header = Header::read(&file)?;
        let mut source = Self::empty(None);
        source.metadata = header.metadata;
        for (name, info) in header.tensors {
            source.push(&file, 0, header.data, name, info)?;
        }
        source.files.push(file);
        Ok(source)
    }

    pub(crate) fn open_folder(folder: ModelFolder) -> Result<Self> {
        let index = match folder.file(INDEX) {
            Ok(file) => Index::read(&file)?,
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                let mut source = Self::from_model_file(folder.file(SINGLE)?)?;
                source.folder = Some(folder);
                return Ok(source);
            }
            Err(error) => return Err(error),
        };
        let mut source = Self::empty(Some(folder));
        let mut left = index.weight_map.0;
        let mut locations: Vec<String> = left.values().cloned().collect();
        locations.sort_unstable();
        locations.dedup();
        for location in &locations {
            let folder = source.folder.as_ref().map(|folder| folder.file(location));
            let Some(file) = folder.transpose()? else {
                continue;
            };
            let header = Header::read(&file)?;
            let number = source.files.len();
            for (name, info) in header.tensors {
                if left.get(&name) == Some(location) {
                    left.remove(&name);
                    source.push(&file, number, header.data, name, info)?;
                }
            }
            for (key, value) in header.metadata {
                source.metadata.entry(key).or_insert(value);
            }
            source.files.push(file);
        }
        match left.iter().min() {
            None => Ok(source),
            Some((name, location)) => Err(Error::BadModel {
                path: source.folder_path().join(INDEX),
                format: FORMAT,
                why: format!("`{name}` should be in `{location}`, which does not have it"),
            }),
        }
    }

    /// The files it is in, to be passed on.
    #[cfg(feature = "daemon")]
    pub(crate) fn passed(&self) -> Result<super::PassedFiles> {
        let Some(folder) = &self.folder else {
            let file = self.files[0].passed(self.files[0].path().parent())?;
            let name = file.0.clone();
            return Ok((vec![file], Some(name)));
        };
        let mut small = sidecar_names(folder)?;
        small.push(INDEX.to_owned());
        let mut files = Vec::new();
        for name in small {
            match folder.file(&name) {
                Ok(file) => files.push(file.passed(Some(folder.path()))?),
                Err(Error::NotAFile { .. }) => {}
                Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        for file in &self.files {
            files.push(file.passed(Some(folder.path()))?);
        }
        Ok((files, None))
    }

    fn empty(folder: Option<ModelFolder>) -> Self {
        Self {
            files: Vec::new(),
            tensors: Vec::new(),
            places: Vec::new(),
            metadata: BTreeMap::new(),
            folder,
        }
    }

    fn folder_path(&self) -> &Path {
        self.folder
            .as_ref()
            .map_or(Path::new(""), ModelFolder::path)
    }

    fn push(
        &mut self,
        file: &ModelFile,
        number: usize,
        data: u64,
        name: String,
        info: TensorInfo,
    ) -> Result<()> {
        check_name(&name).map_err(|why| file.bad(FORMAT, why))?;
        let dtype: DType = info
            .dtype
            .to_string()
            .parse()
            .map_err(|why| file.bad(FORMAT, format!("tensor `{name}`: {why}")))?;
        let (start, end) = info.data_offsets;
        self.tensors.push(SourceTensor {
            name,
            element: ElementType::Plain(dtype),
            shape: Shape::from(info.shape),
            len: (end - start) as u64,
        });
        self.places.push((number, data + start as u64));
        Ok(())
    }
}

/// The names of what belongs to a model in `folder` besides its weights.
fn sidecar_names(folder: &ModelFolder) -> Result<Vec<String>> {
    let is_one = |name: &String| {
        let extension = Path::new(name).extension().and_then(|it| it.to_str());
        name != INDEX && extension.is_some_and(|it| SIDECAR_EXTENSIONS.contains(&it))
    };
    let names = folder.names()?.into_iter();
    Ok(names
        .filter_map(|name| name.into_string().ok())
        .filter(is_one)
        .collect())
}

impl ModelSource for SafetensorsSource {
    fn format(&self) -> SourceFormat {
        SourceFormat::Safetensors
    }

    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn read_at(&self, index: usize, offset: u64, into: &mut [u8]) -> Result<()> {
        check_read(&self.tensors, index, offset, into, self.folder_path())?;
        let (file, start) = self.places[index];
        self.files[file].read_exact_at(start + offset, into)
    }

    fn sidecars(&self) -> Result<Vec<Sidecar>> {
        let mut sidecars = Vec::new();
        if !self.metadata.is_empty() {
            sidecars.push(Sidecar {
                name: METADATA.to_owned(),
                bytes: serde_json::to_vec(&self.metadata).map_err(|why| Error::BadModel {
                    path: self.folder_path().to_owned(),
                    format: FORMAT,
                    why: why.to_string(),
                })?,
            });
        }
        let Some(folder) = &self.folder else {
            return Ok(sidecars);
        };
        let mut total = 0;
        for name in &sidecar_names(folder)? {
            let file = match folder.file(name) {
                Err(Error::NotAFile {
                    kind: "a folder", ..
                }) => continue,
                other => other?,
            };
            total += file.len();
            if file.len() > MAX_SIDECAR || total > MAX_SIDECARS {
                return Err(file.bad(
                    "sidecar",
                    "larger than the 64 MiB that a model's small file may have (256 MiB in all): \
                     move it out of the folder",
                ));
            }
            sidecars.push(Sidecar {
                name: name.clone(),
                bytes: file.read_vec(0, file.len())?,
            });
        }
        sidecars.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(sidecars)
    }
}

/// A file's checked header: the tensors in the order of their bytes, which leave no hole.
#[derive(Debug)]
pub(crate) struct Header {
    /// Where in the file the tensors' bytes begin.
    pub(crate) data: u64,
    pub(crate) tensors: Vec<(String, TensorInfo)>,
    pub(crate) metadata: BTreeMap<String, String>,
}

impl Header {
    pub(crate) fn read(file: &ModelFile) -> Result<Self> {
        let bad = |why: String| file.bad(FORMAT, why);
        if file.len() < 8 {
            return Err(bad("shorter than the 8 bytes of a header length".into()));
        }
        let mut length = [0; 8];
        file.read_exact_at(0, &mut length)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER {
            return Err(bad(format!(
                "a header of {length} bytes is over the format's limit of 100,000,000"
            )));
        }
        let data = 8 + length;
        if data > file.len() {
            return Err(bad(format!(
                "a header of {length} bytes does not fit in a file of {}",
                file.len()
            )));
        }
        let header: RawHeader = serde_json::from_slice(&file.read_vec(8, length)?)
            .map_err(|why| bad(why.to_string()))?;
        let mut tensors = header.tensors;
        tensors.sort_by(|(a_name, a), (b_name, b)| {
            (a.data_offsets, a_name).cmp(&(b.data_offsets, b_name))
        });
        let checked = Metadata::new(None, tensors.clone()).map_err(|why| bad(why.to_string()))?;
        let held = file.len() - data;
        if checked.data_len() as u64 != held {
            return Err(bad(format!(
                "the header describes {} bytes of tensors, the file holds {held}",
                checked.data_len()
            )));
        }
        Ok(Self {
            data,
            tensors,
            metadata: header.metadata,
        })
    }
}

struct RawHeader {
    tensors: Vec<(String, TensorInfo)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map;
        impl<'de> Visitor<'de> for Map {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object of tensors by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut names = HashSet::new();
                let mut header = RawHeader {
                    tensors: Vec::new(),
                    metadata: BTreeMap::new(),
                };
                while let Some(name) = map.next_key::<String>()? {
                    count_name(&mut names, &name)?;
                    if name == "__metadata__" {
                        header.metadata = map
                            .next_value::<Option<Unique<String>>>()?
                            .map(|unique| unique.0.into_iter().collect())
                            .unwrap_or_default();
                    } else {
                        let info: Info = map.next_value()?;
                        let info = TensorInfo {
                            dtype: info.dtype,
                            shape: info.shape.0,
                            data_offsets: info.data_offsets,
                        };
                        header.tensors.push((name, info));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Map)
    }
}

fn count_name<E: de::Error>(names: &mut HashSet<String>, name: &str) -> Result<(), E> {
    if names.len() > MAX_TENSORS {
        return Err(E::custom(format_args!(
            "more than {MAX_TENSORS} tensors in one file"
        )));
    }
    if !names.insert(name.to_owned()) {
        let name: String = name.chars().take(200).collect();
        return Err(E::custom(format_args!("`{name}` stands there twice")));
    }
    Ok(())
}

#[derive(serde::Deserialize)]
struct Info {
    dtype: Dtype,
    shape: Extents,
    data_offsets: (usize, usize),
}

struct Extents(Vec<usize>);

impl<'de> Deserialize<'de> for Extents {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Seq;
        impl<'de> Visitor<'de> for Seq {
            type Value = Extents;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX_RANK} extents")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Extents, A::Error> {
                let mut extents = Vec::new();
                while let Some(extent) = seq.next_element()? {
                    if extents.len() == MAX_RANK {
                        return Err(de::Error::invalid_length(MAX_RANK + 1, &self));
                    }
                    extents.push(extent);
                }
                Ok(Extents(extents))
            }
        }
        deserializer.deserialize_seq(Seq)
    }
}

/// A JSON object in which no key stands twice.
struct Unique<V>(HashMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Unique<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map<V>(std::marker::PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Map<V> {
            type Value = Unique<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Unique<V>, A::Error> {
                let mut names = HashSet::new();
                let mut values = HashMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    count_name(&mut names, &name)?;
                    values.insert(name, map.next_value()?);
                }
                Ok(Unique(values))
            }
        }
        deserializer.deserialize_map(Map(std::marker::PhantomData))
    }
}

/// `model.safetensors.index.json`: which tensor is in which file.
#[derive(serde::Deserialize)]
struct Index {
    #[serde(default, rename = "metadata")]
    _metadata: IgnoredAny,
    weight_map: Unique<String>,
}

impl Index {
    fn read(file: &ModelFile) -> Result<Self> {
        if file.len() > MAX_INDEX {
            return Err(file.bad(FORMAT, "an index of more than 64 MiB"));
        }
        serde_json::from_slice(&file.read_vec(0, file.len())?)
            .map_err(|why| file.bad(FORMAT, why.to_string()))
    }
}
