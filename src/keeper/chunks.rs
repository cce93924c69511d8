//! The units that a closed ZeroFS fills with zeros, and whether a reply may hold such zeros in the place of data.

/// The smallest such unit, in bytes: the chunk of its builds with small ones. A database that closes in the middle of a
/// read leaves the chunks before it whole, so with a larger unit here the zeros behind them would pass for data. The
/// chunks of other builds are multiples of it.
pub const CHUNK: u64 = 32 << 10;

/// Whether some chunk's part of a reply that starts at `offset` is entirely zero.
pub(super) fn has_zero_chunk(offset: u64, data: &[u8]) -> bool {
    let first = (CHUNK - offset % CHUNK).min(data.len() as u64) as usize;
    let (head, rest) = data.split_at(first);
    (!head.is_empty() && is_zero(head)) || rest.chunks(CHUNK as usize).any(is_zero)
}

fn is_zero(data: &[u8]) -> bool {
    // Data is rarely zero at the start, so the cheap look comes first.
    let (start, rest) = data.split_at(data.len().min(64));
    start.iter().all(|b| *b == 0) && rest.chunks(4096).all(|c| c.iter().fold(0, |a, b| a | b) == 0)
}

/// The same question about a reply that is not kept: one byte other than zero is enough to let a chunk's part pass. Where
/// there is none in what is seen of it, the whole has to be looked at.
#[derive(Debug, Clone, Copy)]
pub(super) struct Samples {
    /// The next byte's place on the device.
    at: u64,
    /// The chunk that it is in has shown such a byte.
    shown: bool,
}

impl Samples {
    /// A reply that starts at `offset`, of which nothing has passed.
    pub(super) fn new(offset: u64) -> Samples {
        Samples { at: offset, shown: false }
    }

    /// How many bytes of the chunk are still to come, if it goes on so far.
    pub(super) fn left_in_chunk(&self) -> u64 {
        CHUNK - self.at % CHUNK
    }

    /// How many bytes may pass unseen now; with 0 the next ones have to be [seen](Samples::see).
    pub(super) fn may_pass(&self) -> u64 {
        if self.shown { self.left_in_chunk() } else { 0 }
    }

    /// So many bytes have passed, at most those that might.
    pub(super) fn pass(&mut self, n: u64) {
        self.shown &= n < self.left_in_chunk();
        self.at += n;
    }

    /// These are the next bytes, of this chunk alone; they do not pass yet. Whether some may.
    pub(super) fn see(&mut self, next: &[u8]) -> bool {
        self.shown |= !is_zero(next);
        self.shown
    }

    /// Everything in `next` is seen, and passes: false as soon as a chunk ends that has shown nothing.
    pub(super) fn see_and_pass(&mut self, mut next: &[u8]) -> bool {
        while !next.is_empty() {
            let (part, rest) = next.split_at((self.left_in_chunk() as usize).min(next.len()));
            if !self.see(part) && part.len() as u64 == self.left_in_chunk() {
                return false;
            }
            self.pass(part.len() as u64);
            next = rest;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn zero_chunks_are_found_in_any_part_of_a_reply() {
        let mut data = vec![1; 3 * CHUNK as usize];
        assert!(!has_zero_chunk(0, &data));
        assert!(!has_zero_chunk(5, &[]));
        data[CHUNK as usize..2 * CHUNK as usize].fill(0);
        assert!(has_zero_chunk(0, &data));
        assert!(!has_zero_chunk(1, &data), "the zeros are no whole chunk's part");
        assert!(has_zero_chunk(CHUNK - 100, &[&[0u8; 100][..], &[1; 100]].concat()));
        assert!(has_zero_chunk(CHUNK - 100, &[&[1u8; 100][..], &[0; 100]].concat()));
        assert!(!has_zero_chunk(CHUNK - 100, &[&[0u8; 99][..], &[1; 101]].concat()));
        // A database with chunks of 32 KiB that closed in the middle of a read.
        assert!(has_zero_chunk(0, &[vec![1; 32 << 10], vec![0; 224 << 10]].concat()));
    }

    /// The reply as the data path sees it: a head as a whole, but never all of it, then samples of `sample` bytes. Whether all
    /// of it passed.
    fn passes(offset: u64, data: &[u8], head: usize, sample: usize, step: usize) -> bool {
        let mut samples = Samples::new(offset);
        if !samples.see_and_pass(&data[..head]) {
            return false;
        }
        let mut at = head;
        while at < data.len() {
            let left = data.len() - at;
            if samples.may_pass() == 0 {
                let seen = sample.min(samples.left_in_chunk() as usize).min(left);
                if !samples.see(&data[at..at + seen]) {
                    return false;
                }
            }
            let n = step.min(samples.may_pass() as usize).min(left);
            samples.pass(n as u64);
            at += n;
        }
        true
    }

    proptest! {
        /// What passes by its samples has no chunk of zeros; what has none, and shows that where it is looked at, passes.
        #[test]
        fn no_chunk_of_zeros_ever_passes_by_samples(
            offset in 0..3 * CHUNK,
            runs in prop::collection::vec((any::<bool>(), 1..80_000usize), 1..6),
            head in 0..100_000usize,
            sample in 1..600usize,
            step in 1..100_000usize,
        ) {
            let data: Vec<u8> = runs.iter().flat_map(|&(zeros, len)| vec![u8::from(!zeros); len]).collect();
            let passed = passes(offset, &data, head.min(data.len() - 1), sample, step);
            prop_assert!(!passed || !has_zero_chunk(offset, &data));
            prop_assert!(passed || data.contains(&0), "zeros are the only reason for a closer look");
        }
    }
}
