//! The graph with external data: each initializer names the stored file its bytes are in.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use super::Builder;
use crate::attach::TensorRef;
use crate::error::Result;
use crate::id::ObjectId;
use crate::source::GRAPH;
use crate::source::file::ModelFile;
use crate::source::onnx_proto::{entry, graph, model, tensor};
use crate::source::wire::{Value, Wire, put_bytes, put_varint};

/// Shape inference does not read external data, and what it needs (the operands of Reshape, Slice
/// and the like) is small: `onnx.external_data_helper` keeps less than 1,024 bytes inside as well.
const INSIDE_BELOW: u64 = 1024;

/// `TensorProto.DataLocation.EXTERNAL`.
const EXTERNAL: u64 = 1;

pub(super) fn build(builder: &mut Builder<'_>) -> Result<()> {
    let sidecars = &builder.model.manifest().sidecars;
    let Some(sidecar) = sidecars.iter().find(|sidecar| sidecar.name == GRAPH) else {
        return Err(builder.unsupported("it did not come as an ONNX model, so it has no graph"));
    };
    let file = ModelFile::from_bytes(sidecar.bytes.clone(), Path::new(GRAPH));
    let mut writer = Writer {
        wire: Wire::new("ONNX", &file),
        builder,
        linked: HashMap::new(),
    };
    let model = writer.message(0..file.len(), model::GRAPH, |writer, graph| {
        writer.message(graph, graph::INITIALIZER, Writer::initializer)
    })?;
    let Writer { linked, .. } = writer;
    for (object, bytes) in linked {
        builder.link(object, &file_name(&object), bytes)?;
    }
    builder.write(GRAPH, vec![model.into()])
}

fn file_name(object: &ObjectId) -> String {
    format!("{object}.safetensors")
}

struct Writer<'w, 'm, 'b> {
    wire: Wire<'w>,
    builder: &'m Builder<'b>,
    /// Stored files that the graph names, with the bytes it names in them.
    linked: HashMap<ObjectId, u64>,
}

impl Writer<'_, '_, '_> {
    /// A message with each field `number` rewritten and all others as they are.
    fn message(
        &mut self,
        mut message: Range<u64>,
        number: u32,
        mut rewrite: impl FnMut(&mut Self, Range<u64>) -> Result<Vec<u8>>,
    ) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        while let Some(field) = self.wire.next(&mut message)? {
            match field.value {
                Value::Bytes(body) if field.number == number => {
                    put_bytes(number, &rewrite(self, body)?, &mut out);
                }
                _ => out.extend(self.bytes(field.whole)?),
            }
        }
        Ok(out)
    }

    fn bytes(&self, range: Range<u64>) -> Result<Vec<u8>> {
        self.wire
            .file()
            .read_vec(range.start, range.end - range.start)
    }

    /// An initializer with its data, or with where its data is.
    fn initializer(&mut self, message: Range<u64>) -> Result<Vec<u8>> {
        let mut out = self.bytes(message.clone())?;
        let mut name = String::new();
        let mut rest = message;
        while let Some(field) = self.wire.next(&mut rest)? {
            if let (tensor::NAME, Value::Bytes(bytes)) = (field.number, field.value) {
                name = self.wire.text(&bytes, bytes.end - bytes.start)?;
            }
        }
        // What is no tensor of the model never lost its data.
        if self.builder.model.manifest().tensor(&name).is_none() {
            return Ok(out);
        }
        let TensorRef { entry, bytes } = self.builder.model.tensor(&name)?;
        if entry.len < INSIDE_BELOW {
            put_bytes(tensor::RAW_DATA, bytes, &mut out);
            return Ok(out);
        }
        *self.linked.entry(entry.object).or_default() += entry.len;
        for (key, value) in [
            ("location", file_name(&entry.object)),
            ("offset", entry.offset.to_string()),
            ("length", entry.len.to_string()),
        ] {
            let mut pair = Vec::new();
            put_bytes(entry::KEY, key.as_bytes(), &mut pair);
            put_bytes(entry::VALUE, value.as_bytes(), &mut pair);
            put_bytes(tensor::EXTERNAL_DATA, &pair, &mut out);
        }
        put_varint(tensor::DATA_LOCATION, EXTERNAL, &mut out);
        Ok(out)
    }
}
