//! ONNX: a graph whose initializers are the tensors.
//!
//! The initializers of the main graph become tensors, wherever their bytes are (`raw_data`, a typed
//! field, or external data). The rest of the file becomes the sidecar `model.onnx`: the same bytes,
//! in which only those initializers lack their data.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use carlsbad_types::{DType, Shape};

use super::file::{ModelFile, ModelFolder};
use super::onnx_proto::{DataType, Kind, entry, graph, model, tensor};
use super::wire::{Field, Value, Wire, put_bytes};
use super::{MAX_NAME, MAX_TENSORS, ModelSource, SourceTensor, check_name, check_read};
use crate::element::ElementType;
use crate::error::Result;
use crate::manifest::{Sidecar, SourceFormat};

const FORMAT: &str = "ONNX";
/// The sidecar that is the graph without its weights.
pub(crate) const GRAPH: &str = "model.onnx";
/// What a graph may take without its weights. Protobuf itself ends at 2 GiB, weights included.
const MAX_GRAPH: usize = 256 << 20;
/// What may be decoded from typed fields of variable length; `raw_data` is not decoded.
const MAX_DECODED: u64 = 256 << 20;
const MAX_RANK: usize = 64;
/// How deep graphs may be nested in attributes (`If` within `Loop` within ...).
const MAX_DEPTH: usize = 32;
/// Longest key or value of an external data entry, in bytes: PATH_MAX.
const MAX_VALUE: u64 = 4096;

#[derive(Debug)]
enum Place {
    /// In the file itself.
    Inside(u64),
    /// In external file `.0`.
    Outside(usize, u64),
    /// Decoded from fields of variable length.
    Decoded(Vec<u8>),
}

/// An ONNX model.
///
/// Element types that the store has no name for (complex, 4-bit and 2-bit numbers, the FNUZ and
/// E8M0 floats) are taken as the bytes they are: `U8` of one extent; the graph keeps their real type
/// and shape. String tensors, sparse ones, and those in attributes and subgraphs stay in the graph.
#[derive(Debug)]
pub struct OnnxSource {
    file: ModelFile,
    external: Vec<ModelFile>,
    tensors: Vec<SourceTensor>,
    places: Vec<Place>,
    graph: Vec<u8>,
}

impl OnnxSource {
    /// The model at `path`. Its external data must be in the same folder or below.
    ///
    /// # Errors
    /// [`Error::BadModel`](crate::Error::BadModel), [`Error::NotAFile`](crate::Error::NotAFile),
    /// [`Error::Io`](crate::Error::Io), and [`Error::OutsideModel`](crate::Error::OutsideModel)
    /// where external data leaves the folder.
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_model_file(ModelFile::open(path)?, true)
    }

    /// The model in an open file, all of it: external data is refused. `path` is for messages.
    ///
    /// # Errors
    /// As [`OnnxSource::open`].
    pub fn from_file(file: File, path: &Path) -> Result<Self> {
        Self::from_model_file(ModelFile::from_file(file, path)?, false)
    }

    pub(crate) fn from_model_file(file: ModelFile, named: bool) -> Result<Self> {
        Self::parse(file, named, None)
    }

    /// The model in `file`, whose external data is in `folder`.
    #[cfg(feature = "daemon")]
    pub(crate) fn in_folder(file: ModelFile, folder: ModelFolder) -> Result<Self> {
        Self::parse(file, true, Some(folder))
    }

    /// The files it is in, to be passed on.
    #[cfg(feature = "daemon")]
    pub(crate) fn passed(&self) -> Result<super::PassedFiles> {
        let folder = self.file.path().parent();
        let main = self.file.passed(folder)?;
        let name = main.0.clone();
        let external = self.external.iter().map(|file| file.passed(folder));
        let files = std::iter::once(Ok(main)).chain(external);
        Ok((files.collect::<Result<_>>()?, Some(name)))
    }

    fn parse(file: ModelFile, named: bool, folder: Option<ModelFolder>) -> Result<Self> {
        let mut parser = Parser {
            wire: Wire::new(FORMAT, &file),
            named,
            external: ExternalFiles {
                folder,
                ..ExternalFiles::default()
            },
            names: HashSet::new(),
            initializers: Vec::new(),
            decoded: 0,
        };
        let graph = parser.model(0..file.len())?;
        let Parser {
            external,
            mut initializers,
            ..
        } = parser;
        // File order of each file is the order in which reading is cheapest.
        initializers.sort_by_key(|(_, place)| match place {
            Place::Decoded(_) => (0, 0),
            Place::Inside(offset) => (1, *offset),
            Place::Outside(file, offset) => (2 + file, *offset),
        });
        let (tensors, places) = initializers.into_iter().unzip();
        Ok(Self {
            external: external.files,
            file,
            tensors,
            places,
            graph,
        })
    }
}

impl ModelSource for OnnxSource {
    fn format(&self) -> SourceFormat {
        SourceFormat::Onnx
    }

    fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    fn read_at(&self, index: usize, offset: u64, into: &mut [u8]) -> Result<()> {
        check_read(&self.tensors, index, offset, into, self.file.path())?;
        match &self.places[index] {
            Place::Inside(start) => self.file.read_exact_at(start + offset, into),
            Place::Outside(file, start) => self.external[*file].read_exact_at(start + offset, into),
            Place::Decoded(bytes) => {
                let start = offset as usize;
                into.copy_from_slice(&bytes[start..start + into.len()]);
                Ok(())
            }
        }
    }

    fn sidecars(&self) -> Result<Vec<Sidecar>> {
        Ok(vec![Sidecar {
            name: GRAPH.to_owned(),
            bytes: self.graph.clone(),
        }])
    }
}

/// The external files opened so far, by the name the model has for them.
#[derive(Default)]
struct ExternalFiles {
    folder: Option<ModelFolder>,
    files: Vec<ModelFile>,
    by_location: HashMap<String, usize>,
}

impl ExternalFiles {
    fn open(&mut self, model: &ModelFile, location: String) -> Result<usize> {
        if let Some(&known) = self.by_location.get(&location) {
            return Ok(known);
        }
        let folder = match &mut self.folder {
            Some(folder) => folder,
            none => none.insert(ModelFolder::of(model.path())?),
        };
        self.files.push(folder.file(&location)?);
        let number = self.files.len() - 1;
        self.by_location.insert(location, number);
        Ok(number)
    }
}

/// What an initializer says, before it is judged.
#[derive(Default)]
struct Initializer {
    name: Option<String>,
    dims: Vec<usize>,
    data_type: Option<u64>,
    raw: Option<Range<u64>>,
    /// Each occurrence of a typed data field.
    typed: Vec<Field>,
    external: bool,
    location: Option<String>,
    offset: Option<u64>,
    length: Option<u64>,
    /// All but the data.
    stripped: Vec<u8>,
}

struct Parser<'a> {
    wire: Wire<'a>,
    named: bool,
    external: ExternalFiles,
    names: HashSet<String>,
    initializers: Vec<(SourceTensor, Place)>,
    decoded: u64,
}

impl Parser<'_> {
    /// The model without its weights.
    fn model(&mut self, mut message: Range<u64>) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        let mut kept = message.start..message.start;
        let mut seen = false;
        while let Some(field) = self.wire.next(&mut message)? {
            match (field.number, &field.value) {
                (model::GRAPH, Value::Bytes(body)) => {
                    if std::mem::replace(&mut seen, true) {
                        return Err(self.wire.bad("more than one graph"));
                    }
                    self.keep(&kept, &mut out)?;
                    let graph = self.graph(body.clone())?;
                    put_bytes(model::GRAPH, &graph, &mut out);
                    kept.start = field.whole.end;
                }
                (model::TRAINING_INFO | model::FUNCTIONS, Value::Bytes(body)) => {
                    let kind = match field.number {
                        model::FUNCTIONS => Kind::Function,
                        _ => Kind::Training,
                    };
                    self.refuse_external(body.clone(), kind, 0)?;
                }
                _ => {}
            }
            kept.end = field.whole.end;
        }
        if !seen {
            return Err(self.wire.bad("no graph in it"));
        }
        self.keep(&kept, &mut out)?;
        Ok(out)
    }

    /// The graph without its weights.
    fn graph(&mut self, mut message: Range<u64>) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        let mut kept = message.start..message.start;
        while let Some(field) = self.wire.next(&mut message)? {
            match (field.number, &field.value) {
                (graph::INITIALIZER, Value::Bytes(body)) => {
                    if let Some(stripped) = self.initializer(body.clone())? {
                        self.keep(&kept, &mut out)?;
                        put_bytes(graph::INITIALIZER, &stripped, &mut out);
                        kept.start = field.whole.end;
                    }
                }
                (graph::NODE, Value::Bytes(body)) => {
                    self.refuse_external(body.clone(), Kind::Node, 0)?;
                }
                (graph::SPARSE_INITIALIZER, Value::Bytes(body)) => {
                    self.refuse_external(body.clone(), Kind::Sparse, 0)?;
                }
                _ => {}
            }
            kept.end = field.whole.end;
        }
        self.keep(&kept, &mut out)?;
        Ok(out)
    }

    /// Appends part of the file as it is.
    fn keep(&self, part: &Range<u64>, out: &mut Vec<u8>) -> Result<()> {
        let len = part.end.saturating_sub(part.start);
        if len == 0 {
            return Ok(());
        }
        if out.len() as u64 + len > MAX_GRAPH as u64 {
            return Err(self.wire.bad(
                "the graph takes more than 256 MiB without its initializers: \
                 turn large Constant nodes into initializers",
            ));
        }
        out.extend(self.wire.file().read_vec(part.start, len)?);
        Ok(())
    }

    /// Takes an initializer's data as a tensor, and returns what is left of it; or `None` where it
    /// stays as it is.
    fn initializer(&mut self, message: Range<u64>) -> Result<Option<Vec<u8>>> {
        let found = self.read_initializer(message)?;
        let name = found.name.unwrap_or_default();
        check_name(&name).map_err(|why| self.wire.bad(why))?;
        let about = |why: String| self.wire.bad(format!("initializer `{name}`: {why}"));
        if !self.names.insert(name.clone()) {
            return Err(about("it stands there twice".into()));
        }
        if self.names.len() > MAX_TENSORS {
            return Err(about(format!("more than {MAX_TENSORS} initializers")));
        }
        let code = found.data_type.unwrap_or(0);
        if code == DataType::STRING {
            if found.external {
                return Err(about("strings cannot be external data".into()));
            }
            return Ok(None);
        }
        let data_type = DataType::from_code(code)
            .ok_or_else(|| about(format!("{code} is no known data type")))?;
        let shape = Shape::from(found.dims);
        let (element, shape, len) = match data_type.dtype {
            Some(dtype) => {
                let element = ElementType::Plain(dtype);
                let len = element.byte_size(&shape)?.get();
                (element, shape, len)
            }
            None => {
                let bits = shape
                    .elements()
                    .and_then(|elements| (elements as u64).checked_mul(data_type.bits));
                let len = bits
                    .map(|bits| bits.div_ceil(8))
                    .ok_or_else(|| about(format!("its shape {shape} has no size")))?;
                let bytes = usize::try_from(len).map_err(|why| about(why.to_string()))?;
                (DType::U8.into(), Shape::from([bytes]), len)
            }
        };

        let forms = usize::from(found.raw.is_some())
            + usize::from(!found.typed.is_empty())
            + usize::from(found.external);
        if forms > 1 {
            return Err(about("its data is there in two forms".into()));
        }
        let place = if found.external {
            if !self.named {
                return Err(about(
                    "its data is in another file, which cannot be found from an open file: \
                     open the model by its path"
                        .into(),
                ));
            }
            let location = found
                .location
                .ok_or_else(|| about("external data without a location".into()))?;
            let file = self.external.open(self.wire.file(), location)?;
            let held = self.external.files[file].len();
            let offset = found.offset.unwrap_or(0);
            let length = found.length.unwrap_or(len);
            if length != len {
                return Err(about(format!(
                    "{length} bytes of external data instead of {len}"
                )));
            }
            if offset.checked_add(len).is_none_or(|end| end > held) {
                return Err(about(format!(
                    "external data at {offset} of {len} bytes in a file of {held}"
                )));
            }
            Place::Outside(file, offset)
        } else if let Some(raw) = found.raw {
            let held = raw.end - raw.start;
            if held != len {
                return Err(about(format!("{held} bytes of data instead of {len}")));
            }
            Place::Inside(raw.start)
        } else {
            self.typed(&name, data_type, &found.typed, len)?
        };
        self.initializers.push((
            SourceTensor {
                name,
                element,
                shape,
                len,
            },
            place,
        ));
        Ok(Some(found.stripped))
    }

    fn read_initializer(&mut self, mut message: Range<u64>) -> Result<Initializer> {
        let mut found = Initializer::default();
        let mut rank = 0;
        let mut kept = message.start..message.start;
        while let Some(field) = self.wire.next(&mut message)? {
            let mut data = false;
            match (field.number, &field.value) {
                (tensor::DIMS, value) => {
                    let mut packed = match value {
                        Value::Bytes(packed) => packed.clone(),
                        _ => 0..0,
                    };
                    if let Value::Varint(extent) = value {
                        found.dims.push(self.extent(*extent)?);
                        rank += 1;
                    }
                    while !packed.is_empty() && rank <= MAX_RANK {
                        let extent = self.wire.varint(&mut packed)?;
                        found.dims.push(self.extent(extent)?);
                        rank += 1;
                    }
                    if rank > MAX_RANK {
                        return Err(self.wire.bad(format!("more than {MAX_RANK} extents")));
                    }
                }
                (tensor::DATA_TYPE, Value::Varint(code)) => found.data_type = Some(*code),
                (tensor::NAME, Value::Bytes(bytes)) => {
                    let name = self.wire.text(bytes, MAX_NAME as u64)?;
                    if found.name.replace(name).is_some() {
                        return Err(self.wire.bad("an initializer with two names"));
                    }
                }
                (tensor::SEGMENT, _) => {
                    return Err(self.wire.bad("an initializer in segments"));
                }
                (tensor::RAW_DATA, Value::Bytes(bytes)) => {
                    if found.raw.replace(bytes.clone()).is_some() {
                        return Err(self.wire.bad("an initializer with raw_data twice"));
                    }
                    data = true;
                }
                (
                    tensor::FLOAT_DATA
                    | tensor::INT32_DATA
                    | tensor::INT64_DATA
                    | tensor::DOUBLE_DATA
                    | tensor::UINT64_DATA,
                    _,
                ) => {
                    found.typed.push(field.clone());
                    data = true;
                }
                (tensor::STRING_DATA, _) => {}
                (tensor::EXTERNAL_DATA, Value::Bytes(bytes)) => {
                    self.external_entry(bytes.clone(), &mut found)?;
                    data = true;
                }
                (tensor::DATA_LOCATION, Value::Varint(location)) => {
                    found.external = *location == 1;
                    data = true;
                }
                _ => {}
            }
            if data {
                self.keep(&kept, &mut found.stripped)?;
                kept.start = field.whole.end;
            }
            kept.end = field.whole.end;
        }
        self.keep(&kept, &mut found.stripped)?;
        Ok(found)
    }

    fn extent(&self, extent: u64) -> Result<usize> {
        // dims are int64: what has the top bit is negative.
        i64::try_from(extent)
            .ok()
            .and_then(|extent| usize::try_from(extent).ok())
            .ok_or_else(|| self.wire.bad(format!("{} is no extent", extent as i64)))
    }

    fn external_entry(&mut self, mut message: Range<u64>, found: &mut Initializer) -> Result<()> {
        let (mut key, mut value) = (String::new(), String::new());
        while let Some(field) = self.wire.next(&mut message)? {
            match (field.number, &field.value) {
                (entry::KEY, Value::Bytes(bytes)) => key = self.wire.text(bytes, MAX_VALUE)?,
                (entry::VALUE, Value::Bytes(bytes)) => value = self.wire.text(bytes, MAX_VALUE)?,
                _ => {}
            }
        }
        let number = || {
            value
                .parse()
                .map_err(|_| self.wire.bad(format!("external data {key} `{value}`")))
        };
        let twice = match key.as_str() {
            "location" => found.location.replace(value).is_some(),
            "offset" => found.offset.replace(number()?).is_some(),
            "length" => found.length.replace(number()?).is_some(),
            _ => false,
        };
        if twice {
            return Err(self.wire.bad("external data with a key twice"));
        }
        Ok(())
    }

    /// Data in a typed field. On a little-endian machine, packed floats are what they are in
    /// memory; integers are varints and must be decoded.
    fn typed(
        &mut self,
        name: &str,
        data_type: DataType,
        fields: &[Field],
        len: u64,
    ) -> Result<Place> {
        let wrong = |wire: &Wire<'_>, why: String| wire.bad(format!("initializer `{name}`: {why}"));
        if let Some(field) = fields
            .iter()
            .find(|field| field.number != data_type.typed_field)
        {
            let why = format!("field {} is not for its data type", field.number);
            return Err(wrong(&self.wire, why));
        }
        let fixed = matches!(
            data_type.typed_field,
            tensor::FLOAT_DATA | tensor::DOUBLE_DATA
        );
        if let (
            [
                Field {
                    value: Value::Bytes(bytes),
                    ..
                },
            ],
            true,
        ) = (fields, fixed)
        {
            let held = bytes.end - bytes.start;
            if held != len {
                let why = format!("{held} bytes of data instead of {len}");
                return Err(wrong(&self.wire, why));
            }
            if cfg!(target_endian = "little") {
                return Ok(Place::Inside(bytes.start));
            }
        }
        // Each entry takes at least a byte of the file, so no more can be decoded than eight times
        // what is there.
        let held: u64 = fields
            .iter()
            .map(|field| field.whole.end - field.whole.start)
            .sum();
        if len > held.saturating_mul(data_type.typed_bytes as u64) {
            return Err(wrong(&self.wire, format!("fewer than {len} bytes of data")));
        }
        self.decoded += len;
        if self.decoded > MAX_DECODED {
            let why = "more than 256 MiB in typed fields: save the model with raw_data".to_owned();
            return Err(wrong(&self.wire, why));
        }
        let mut bytes = Vec::with_capacity(len as usize);
        for field in fields {
            match &field.value {
                Value::Varint(value) if !fixed => {
                    bytes.extend_from_slice(&value.to_le_bytes()[..data_type.typed_bytes]);
                }
                Value::Fixed(number) if fixed => {
                    bytes.extend(
                        self.wire
                            .file()
                            .read_vec(number.start, number.end - number.start)?,
                    );
                }
                Value::Bytes(packed) if fixed => {
                    let held = packed.end - packed.start;
                    if held > len {
                        break;
                    }
                    bytes.extend(self.wire.file().read_vec(packed.start, held)?);
                }
                Value::Bytes(packed) => {
                    let mut packed = packed.clone();
                    while !packed.is_empty() && bytes.len() as u64 <= len {
                        let value = self.wire.varint(&mut packed)?;
                        bytes.extend_from_slice(&value.to_le_bytes()[..data_type.typed_bytes]);
                    }
                }
                _ => return Err(wrong(&self.wire, "data of another wire type".into())),
            }
            if bytes.len() as u64 > len {
                break;
            }
        }
        if bytes.len() as u64 != len {
            return Err(wrong(
                &self.wire,
                format!("not the {len} bytes of data it needs"),
            ));
        }
        Ok(Place::Decoded(bytes))
    }

    /// Tensors below the main graph stay where they are, so their data must be there as well.
    fn refuse_external(&mut self, mut message: Range<u64>, kind: Kind, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(self.wire.bad(format!("nested deeper than {MAX_DEPTH}")));
        }
        while let Some(field) = self.wire.next(&mut message)? {
            match &field.value {
                Value::Bytes(body) => {
                    if let Some(inner) = kind.within(field.number) {
                        self.refuse_external(body.clone(), inner, depth + 1)?;
                    }
                }
                Value::Varint(1)
                    if matches!(kind, Kind::Tensor) && field.number == tensor::DATA_LOCATION =>
                {
                    return Err(self.wire.bad(
                        "external data in a subgraph, an attribute or a sparse tensor: \
                         save the model with those inline",
                    ));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
