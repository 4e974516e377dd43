//! Protobuf's wire format, walked field by field over a file.
//!
//! Decoding into structs would drop the fields they do not know, and hold the weights in memory.
//! The walk keeps what it does not touch byte for byte, and never descends by itself: a message is
//! entered by asking for its fields, so nesting costs no stack.
//! (protobuf.dev/programming-guides/encoding)

use std::ops::Range;

use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};

use super::file::{ModelFile, Window};
use crate::error::Result;

/// Groups are deprecated and ONNX has none; unknown ones are stepped over, to this depth.
const MAX_GROUPS: usize = 64;
/// A key of 5 bytes and a varint of 10.
const LONGEST_HEAD: usize = 15;

/// One field of a message.
#[derive(Debug, Clone)]
pub(crate) struct Field {
    pub(crate) number: u32,
    /// The whole field, its key included.
    pub(crate) whole: Range<u64>,
    pub(crate) value: Value,
}

#[derive(Debug, Clone)]
pub(crate) enum Value {
    Varint(u64),
    /// 4 or 8 bytes, which begin there.
    Fixed(Range<u64>),
    /// A string, bytes, a message or packed numbers.
    Bytes(Range<u64>),
    Group,
}

/// A walk over the messages of one file.
pub(crate) struct Wire<'a> {
    format: &'static str,
    window: Window<'a>,
}

impl<'a> Wire<'a> {
    pub(crate) fn new(format: &'static str, file: &'a ModelFile) -> Self {
        Self {
            format,
            window: Window::new(file),
        }
    }

    pub(crate) fn file(&self) -> &'a ModelFile {
        self.window.file()
    }

    pub(crate) fn bad(&self, why: impl Into<String>) -> crate::Error {
        self.file().bad(self.format, why)
    }

    /// The first field in `message`, which is then the rest of it. `None` at its end.
    pub(crate) fn next(&mut self, message: &mut Range<u64>) -> Result<Option<Field>> {
        if message.is_empty() {
            return Ok(None);
        }
        let start = message.start;
        let (number, wire_type) = self.key(message)?;
        let value = match wire_type {
            WireType::Varint => Value::Varint(self.varint(message)?),
            WireType::ThirtyTwoBit => Value::Fixed(self.skip(message, 4)?),
            WireType::SixtyFourBit => Value::Fixed(self.skip(message, 8)?),
            WireType::LengthDelimited => {
                let len = self.varint(message)?;
                Value::Bytes(self.skip(message, len)?)
            }
            WireType::StartGroup => {
                self.skip_group(message, number)?;
                Value::Group
            }
            WireType::EndGroup => return Err(self.bad("a group ends that has not begun")),
        };
        Ok(Some(Field {
            number,
            whole: start..message.start,
            value,
        }))
    }

    /// The next varint in `packed`.
    pub(crate) fn varint(&mut self, packed: &mut Range<u64>) -> Result<u64> {
        self.decode(packed, |head| decode_varint(head))
    }

    /// A short string. `limit` is in bytes.
    pub(crate) fn text(&mut self, bytes: &Range<u64>, limit: u64) -> Result<String> {
        let len = bytes.end - bytes.start;
        if len > limit {
            return Err(self.bad(format!(
                "a name of {len} bytes is over the limit of {limit}"
            )));
        }
        String::from_utf8(self.file().read_vec(bytes.start, len)?)
            .map_err(|_| self.bad("a name that is not UTF-8"))
    }

    fn key(&mut self, message: &mut Range<u64>) -> Result<(u32, WireType)> {
        self.decode(message, |head| decode_key(head))
    }

    fn decode<T>(
        &mut self,
        range: &mut Range<u64>,
        decode: impl FnOnce(&mut &[u8]) -> std::result::Result<T, prost::DecodeError>,
    ) -> Result<T> {
        let limit = LONGEST_HEAD.min((range.end - range.start) as usize);
        let mut head = self.window.peek(range.start, limit)?;
        let before = head.len();
        match decode(&mut head) {
            Ok(value) => {
                range.start += (before - head.len()) as u64;
                Ok(value)
            }
            Err(why) => Err(self.bad(format!("at byte {}: {why}", range.start))),
        }
    }

    fn skip(&mut self, message: &mut Range<u64>, len: u64) -> Result<Range<u64>> {
        let start = message.start;
        match start.checked_add(len).filter(|end| *end <= message.end) {
            Some(end) => {
                message.start = end;
                Ok(start..end)
            }
            None => Err(self.bad(format!(
                "at byte {start}: a field of {len} bytes in a message that has {} left",
                message.end - start
            ))),
        }
    }

    fn skip_group(&mut self, message: &mut Range<u64>, number: u32) -> Result<()> {
        let mut open = vec![number];
        while let Some(&innermost) = open.last() {
            let (number, wire_type) = self.key(message)?;
            match wire_type {
                WireType::Varint => {
                    self.varint(message)?;
                }
                WireType::ThirtyTwoBit => {
                    self.skip(message, 4)?;
                }
                WireType::SixtyFourBit => {
                    self.skip(message, 8)?;
                }
                WireType::LengthDelimited => {
                    let len = self.varint(message)?;
                    self.skip(message, len)?;
                }
                WireType::StartGroup if open.len() < MAX_GROUPS => open.push(number),
                WireType::StartGroup => return Err(self.bad("groups nested too deep")),
                WireType::EndGroup if number == innermost => {
                    open.pop();
                }
                WireType::EndGroup => return Err(self.bad("another group ends than has begun")),
            }
        }
        Ok(())
    }
}

/// Appends a string, bytes or message field.
pub(crate) fn put_bytes(number: u32, bytes: &[u8], into: &mut Vec<u8>) {
    encode_key(number, WireType::LengthDelimited, into);
    encode_varint(bytes.len() as u64, into);
    into.extend_from_slice(bytes);
}

/// Appends an integer or enum field.
pub(crate) fn put_varint(number: u32, value: u64, into: &mut Vec<u8>) {
    encode_key(number, WireType::Varint, into);
    encode_varint(value, into);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn walk(bytes: &[u8]) -> Result<Vec<Field>> {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, bytes).unwrap();
        let file = ModelFile::from_file(file, Path::new("message")).unwrap();
        let mut wire = Wire::new("test", &file);
        let mut message = 0..file.len();
        let mut fields = Vec::new();
        while let Some(field) = wire.next(&mut message)? {
            fields.push(field);
        }
        Ok(fields)
    }

    #[test]
    fn fields_cover_the_message() {
        let mut bytes = Vec::new();
        put_varint(1, u64::MAX, &mut bytes);
        put_bytes(536_870_911, &vec![7; 100_000], &mut bytes);
        encode_key(3, WireType::ThirtyTwoBit, &mut bytes);
        bytes.extend([1, 2, 3, 4]);
        encode_key(4, WireType::StartGroup, &mut bytes);
        encode_key(5, WireType::StartGroup, &mut bytes);
        put_bytes(6, b"x", &mut bytes);
        encode_key(5, WireType::EndGroup, &mut bytes);
        encode_key(4, WireType::EndGroup, &mut bytes);
        let fields = walk(&bytes).unwrap();
        let numbers: Vec<u32> = fields.iter().map(|field| field.number).collect();
        assert_eq!(numbers, [1, 536_870_911, 3, 4]);
        let mut end = 0;
        for field in &fields {
            assert_eq!(field.whole.start, end);
            end = field.whole.end;
        }
        assert_eq!(end, bytes.len() as u64);
        for cut in 0..bytes.len().min(40) {
            // A prefix may end between two fields; it must never panic.
            let _ = walk(&bytes[..cut]);
        }
        assert!(walk(&bytes[..50_000]).is_err());
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for bytes in [
            &[0x0c][..],                                             // a group that has not begun
            &[0x0b, 0x14],                                           // another group ends
            &[0x0b],                                                 // a group without end
            &[0x08],                                                 // a varint without end
            &[0x00, 0x01],                                           // field number 0
            &[0x0a, 0x05, 0x01],                                     // longer than the message
            &[0x0a, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1], // longer than memory
            &[0x0f],                                                 // wire type 7
            &[0xff; 20],                                             // a key without end
        ] {
            assert!(walk(bytes).is_err(), "{bytes:?}");
        }
        let deep = vec![0x0b; 100_000];
        assert!(walk(&deep).is_err());
    }
}
