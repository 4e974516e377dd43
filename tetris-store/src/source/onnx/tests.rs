use super::*;
use crate::source::onnx_proto::{attribute, node};
use crate::source::wire::put_varint;

/// The smallest model with the given initializers.
fn model_of(initializers: &[Vec<u8>]) -> Vec<u8> {
    let mut body = Vec::new();
    put_bytes(2, b"g", &mut body);
    for initializer in initializers {
        put_bytes(graph::INITIALIZER, initializer, &mut body);
    }
    let mut out = Vec::new();
    put_varint(1, 8, &mut out);
    put_bytes(model::GRAPH, &body, &mut out);
    put_bytes(200, b"from the future", &mut out);
    out
}

fn initializer(name: &str, code: u64, dims: &[u64]) -> Vec<u8> {
    let mut out = Vec::new();
    for &extent in dims {
        put_varint(tensor::DIMS, extent, &mut out);
    }
    put_varint(tensor::DATA_TYPE, code, &mut out);
    put_bytes(tensor::NAME, name.as_bytes(), &mut out);
    out
}

fn open(bytes: &[u8]) -> Result<OnnxSource> {
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, bytes).unwrap();
    OnnxSource::from_file(file, Path::new("model.onnx"))
}

fn data(source: &OnnxSource, name: &str) -> (SourceTensor, Vec<u8>) {
    let index = source
        .tensors()
        .iter()
        .position(|tensor| tensor.name == name)
        .unwrap();
    let tensor = source.tensors()[index].clone();
    let mut bytes = vec![0; tensor.len as usize];
    source.read_at(index, 0, &mut bytes).unwrap();
    (tensor, bytes)
}

#[test]
fn data_is_found_in_every_form() {
    let mut raw = initializer("raw", 1, &[2]);
    put_bytes(tensor::RAW_DATA, &[1, 2, 3, 4, 5, 6, 7, 8], &mut raw);
    let mut floats = initializer("floats", 1, &[1, 2]);
    let packed: Vec<u8> = [1.5f32, -2.0]
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    put_bytes(tensor::FLOAT_DATA, &packed, &mut floats);
    let mut one_by_one = initializer("unpacked", 7, &[2]);
    put_varint(tensor::INT64_DATA, 5, &mut one_by_one);
    put_varint(tensor::INT64_DATA, (-5i64) as u64, &mut one_by_one);
    let mut halves = initializer("halves", 10, &[2]);
    put_bytes(tensor::INT32_DATA, &[0x80, 0x78, 1], &mut halves);
    let mut nibbles = initializer("nibbles", 22, &[3]);
    put_bytes(tensor::RAW_DATA, &[0x21, 0x03], &mut nibbles);
    let mut scalar = initializer("scalar", 9, &[]);
    put_bytes(tensor::INT32_DATA, &[1], &mut scalar);
    let empty = initializer("empty", 1, &[0, 7]);
    let mut text = initializer("text", 8, &[1]);
    put_bytes(tensor::STRING_DATA, b"hello", &mut text);
    let model = model_of(&[
        raw, floats, one_by_one, halves, nibbles, scalar, empty, text,
    ]);
    let source = open(&model).unwrap();
    assert_eq!(source.tensors().len(), 7);
    assert_eq!(data(&source, "raw").1, [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(data(&source, "floats").1, packed);
    let signed = data(&source, "unpacked").1;
    assert_eq!(signed[..8], 5i64.to_le_bytes());
    assert_eq!(signed[8..], (-5i64).to_le_bytes());
    assert_eq!(data(&source, "halves").1, [0, 0x3c, 1, 0]);
    let (nibbles, bytes) = data(&source, "nibbles");
    assert_eq!((nibbles.shape, bytes), (Shape::from([2]), vec![0x21, 0x03]));
    let (scalar, bytes) = data(&source, "scalar");
    assert_eq!((scalar.shape.rank(), bytes), (0, vec![1]));
    assert!(data(&source, "empty").1.is_empty());

    // What is left opens again as a model: all but the string lacks its data.
    let graph = &source.sidecars().unwrap()[0].bytes;
    let has = |text: &[u8]| graph.windows(text.len()).any(|window| window == text);
    assert!(has(b"hello") && has(b"from the future") && has(b"floats"));
    assert!(!has(&packed));
}

#[test]
fn what_contradicts_itself_is_refused() {
    let with = |field: u32, bytes: &[u8]| {
        let mut out = initializer("x", 1, &[2]);
        put_bytes(field, bytes, &mut out);
        out
    };
    let raw = with(tensor::RAW_DATA, &[0; 8]);
    let mut two_forms = raw.clone();
    put_bytes(tensor::FLOAT_DATA, &[0; 8], &mut two_forms);
    let mut external = initializer("x", 1, &[2]);
    put_varint(tensor::DATA_LOCATION, 1, &mut external);
    let mut endless = initializer("x", 1, &[1 << 40, 1 << 40]);
    put_bytes(tensor::RAW_DATA, &[0; 8], &mut endless);
    let mut many = initializer("x", 1, &[1; 65]);
    put_bytes(tensor::RAW_DATA, &[0; 4], &mut many);
    for bad in [
        vec![raw.clone(), raw.clone()],
        vec![with(tensor::RAW_DATA, &[0; 7])],
        vec![with(tensor::FLOAT_DATA, &[0; 12])],
        vec![with(tensor::INT64_DATA, &[0; 2])],
        vec![initializer("x", 1, &[2])],
        vec![initializer("x", 1, &[u64::MAX])],
        vec![initializer("x", 99, &[0])],
        vec![initializer("", 1, &[0])],
        vec![initializer("a\0b", 1, &[0])],
        vec![initializer(&"n".repeat(5000), 1, &[0])],
        vec![two_forms],
        vec![external],
        vec![endless],
        vec![many],
    ] {
        let refused = open(&model_of(&bad));
        assert!(refused.is_err(), "{refused:?}");
    }
    assert!(open(&model_of(&[raw])).is_ok());
    assert!(open(&[]).is_err());
}

#[test]
fn nesting_ends() {
    // A graph in an attribute of a node of a graph ...: 200 deep.
    let mut inner = Vec::new();
    put_bytes(2, b"innermost", &mut inner);
    let nest = |mut inner: Vec<u8>, depth: usize| {
        for _ in 0..depth {
            let mut attribute = Vec::new();
            put_bytes(attribute::GRAPH, &inner, &mut attribute);
            let mut node = Vec::new();
            put_bytes(node::ATTRIBUTE, &attribute, &mut node);
            inner = Vec::new();
            put_bytes(graph::NODE, &node, &mut inner);
        }
        let mut model = Vec::new();
        put_bytes(model::GRAPH, &inner, &mut model);
        model
    };
    assert!(open(&nest(inner.clone(), 5)).is_ok());
    assert!(open(&nest(inner, 200)).is_err());

    let mut external = initializer("x", 1, &[2]);
    put_varint(tensor::DATA_LOCATION, 1, &mut external);
    let mut below = Vec::new();
    put_bytes(graph::INITIALIZER, &external, &mut below);
    assert!(open(&nest(below, 2)).is_err());
}
