//! Output that the owner collects: kept until there is a message's worth, or the guest ends.

use std::fmt;

/// How much is kept before it is sent.
const CHUNK: usize = 32 << 10;

/// Takes what a guest wrote to stream 1 or 2.
pub type Sink = Box<dyn FnMut(u8, &[u8])>;

/// The captured streams of a guest process.
pub struct Outputs {
    kept: [Vec<u8>; 2],
    /// Bytes that may still come.
    left: u64,
    /// Whether more came.
    pub truncated: bool,
    sink: Sink,
}

impl fmt::Debug for Outputs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outputs")
            .field("left", &self.left)
            .finish_non_exhaustive()
    }
}

impl Outputs {
    /// Nothing yet, and at most `most` bytes.
    pub fn new(most: u64, sink: Sink) -> Self {
        Self {
            kept: [Vec::new(), Vec::new()],
            left: most,
            truncated: false,
            sink,
        }
    }

    /// Keeps what a guest wrote.
    pub fn take(&mut self, stream: u8, bytes: &[u8]) {
        let room = usize::try_from(self.left).unwrap_or(usize::MAX);
        let taken = &bytes[..bytes.len().min(room)];
        self.truncated |= taken.len() < bytes.len();
        self.left -= taken.len() as u64;
        let kept = &mut self.kept[usize::from(stream == 2)];
        kept.extend_from_slice(taken);
        if kept.len() >= CHUNK {
            self.flush();
        }
    }

    /// Sends what is kept.
    pub fn flush(&mut self) {
        for (stream, kept) in [1, 2].into_iter().zip(&mut self.kept) {
            for chunk in kept.chunks(CHUNK) {
                (self.sink)(stream, chunk);
            }
            kept.clear();
        }
    }

    /// What is kept, instead of sending it.
    pub fn kept(&mut self) -> [Vec<u8>; 2] {
        std::mem::take(&mut self.kept)
    }
}
