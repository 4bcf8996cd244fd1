//! Files that hold guests' memory, on this machine or on a host where an agent carries out orders about them.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use memlane_lab::LabHost;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::baseline::memory::SharedMemory;

/// The order to compute the digests of a file.
const DIGEST: &str = "digest";
/// The order to make a file whose contents cannot be compressed.
const FILL: &str = "fill";
/// The number of bytes that have a digest of their own.
pub(super) const PIECE: usize = 1 << 20;

#[derive(Deserialize)]
struct FillOrder {
    path: PathBuf,
    bytes: usize,
}

/// Answers the orders of this file for an agent; returns `None` for other orders.
pub fn carry_out(name: &str, order: &Value) -> Option<Result<Value>> {
    Some(match name {
        DIGEST => order["path"]
            .as_str()
            .context("an order without path")
            .and_then(|path| Ok(json!(digests(Path::new(path))?))),
        FILL => FillOrder::deserialize(order)
            .context("an order")
            .and_then(|FillOrder { path, bytes }| fill_here(&path, bytes).map(|()| Value::Null)),
        _ => return None,
    })
}

/// Makes a file on a host, whose contents cannot be compressed.
pub(super) fn fill(host: &LabHost, path: &Path, bytes: usize) -> Result<()> {
    match host.remote() {
        None => fill_here(path, bytes),
        Some(remote) => remote.ask(FILL, json!({ "path": path, "bytes": bytes })).map(drop),
    }
}

fn fill_here(path: &Path, bytes: usize) -> Result<()> {
    let contents = SharedMemory::with_pattern(bytes)?;
    fs::write(path, &*contents).with_context(|| format!("writing {}", path.display()))
}

/// Computes the digests of a file's pieces, on a host.
pub(super) fn digests_on(host: &LabHost, path: &Path) -> Result<Vec<u64>> {
    match host.remote() {
        None => digests(path),
        Some(remote) => {
            let digests = remote.ask(DIGEST, json!({ "path": path }))?;
            serde_json::from_value(digests).context("what an agent tells of a file")
        }
    }
}

/// Computes the digests of a file's pieces.
fn digests(path: &Path) -> Result<Vec<u64>> {
    let failed = || format!("reading {}", path.display());
    let mut file = File::open(path).with_context(failed)?;
    let (mut piece, mut digests) = (Vec::with_capacity(PIECE), Vec::new());
    while file.by_ref().take(PIECE as u64).read_to_end(&mut piece).with_context(failed)? > 0 {
        let mut hasher = DefaultHasher::new();
        hasher.write(&piece);
        digests.push(hasher.finish());
        piece.clear();
    }
    Ok(digests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_made_and_told_apart() {
        let path = std::env::temp_dir().join(format!("memlane-files-{}", std::process::id()));
        let order = json!({ "path": path, "bytes": 2 * PIECE + 1 });
        carry_out(FILL, &order).expect("an order").expect("a file");
        let before = carry_out(DIGEST, &order).expect("an order").expect("digests");
        assert_eq!(before.as_array().map(Vec::len), Some(3));
        let mut bytes = fs::read(&path).expect("a file");
        bytes[PIECE] ^= 1;
        fs::write(&path, bytes).expect("a file");
        let after = carry_out(DIGEST, &order).expect("an order").expect("digests");
        fs::remove_file(&path).expect("a file");
        assert_eq!((&before[0], &before[2]), (&after[0], &after[2]));
        assert_ne!(before[1], after[1]);
        assert!(carry_out(DIGEST, &order).expect("an order").is_err(), "it is gone");
        assert!(carry_out(FILL, &json!({})).expect("an order").is_err());
        assert!(carry_out("fly", &order).is_none());
    }
}
