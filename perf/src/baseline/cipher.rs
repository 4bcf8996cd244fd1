//! The speed at which one core seals and opens records: the cipher, and nothing else.

use std::time::Instant;

use anyhow::{Result, anyhow, ensure};
use ring::aead::{AES_128_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, Tag, UnboundKey};

use crate::report::NamedFigures;

/// A record of TLS 1.3 has this many bytes of data.
const RECORD_BYTES: usize = 16 << 10;
/// Each figure is the best of this many measurements: another guest of the machine may have the core for a while.
const TRIES: usize = 5;

/// Seals and opens `bytes` with AES-128-GCM on one core, record by record and in the cache. Returns `seal_gbit_per_second`
/// and `open_gbit_per_second`.
///
/// # Errors
///
/// If a record does not open.
pub fn measure(bytes: usize) -> Result<NamedFigures> {
    let key = UnboundKey::new(&AES_128_GCM, &[7; 16]).map_err(|_| anyhow!("the key is refused"))?;
    let key = LessSafeKey::new(key);
    let mut record = vec![1; RECORD_BYTES];
    let (mut seal, mut open) = (f64::INFINITY, f64::INFINITY);
    let rounds = bytes.div_ceil(RECORD_BYTES * TRIES);
    for _ in 0..TRIES {
        let started = Instant::now();
        let mut tag: Option<Tag> = None;
        for _ in 0..rounds {
            tag = key.seal_in_place_separate_tag(nonce(), Aad::empty(), &mut record).ok();
        }
        seal = seal.min(started.elapsed().as_secs_f64());
        ensure!(tag.is_some(), "a record cannot be sealed");
        // Opened again and again: the last one sealed is what opens, and the copy is in the cache.
        let mut sealed = vec![1; RECORD_BYTES];
        let tag = key.seal_in_place_separate_tag(nonce(), Aad::empty(), &mut sealed);
        let tag = tag.map_err(|_| anyhow!("a record cannot be sealed"))?;
        let mut copies: Vec<Vec<u8>> = vec![sealed; 8];
        let mut elapsed = 0.0;
        for _ in 0..rounds.div_ceil(copies.len()) {
            let started = Instant::now();
            for copy in &mut copies {
                key.open_in_place_separate_tag(nonce(), Aad::empty(), tag, copy, 0..)
                    .map_err(|_| anyhow!("a record does not open"))?;
            }
            elapsed += started.elapsed().as_secs_f64();
            for copy in &mut copies {
                let again = key.seal_in_place_separate_tag(nonce(), Aad::empty(), copy);
                ensure!(again.is_ok(), "a record cannot be sealed");
            }
        }
        open = open.min(elapsed);
    }
    let gbit = |seconds: f64| (rounds * RECORD_BYTES) as f64 * 8.0 / 1e9 / seconds;
    Ok(NamedFigures::from([("seal_gbit_per_second", gbit(seal)), ("open_gbit_per_second", gbit(open))]))
}

/// Returns always the same nonce: nothing here is secret.
fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([3; NONCE_LEN])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_are_measured() {
        let figures = measure(1 << 20).expect("a measurement");
        let measured: Vec<_> = figures.iter().map(|(name, gbit)| (name, gbit > 0.0)).collect();
        assert_eq!(measured, [("seal_gbit_per_second", true), ("open_gbit_per_second", true)]);
    }
}
