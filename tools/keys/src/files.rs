//! Files that only their owner may read.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use crate::KeysError;

/// A file of keys or certificates is never longer than this.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Makes a directory that only its owner may enter, and those above it as the umask has it. What is there stays as it is.
pub(crate) fn make_directory(path: &Path) -> Result<(), KeysError> {
    let above = path.parent().map_or(Ok(()), fs::create_dir_all);
    let made = above.and_then(|()| DirBuilder::new().recursive(true).mode(0o700).create(path));
    made.map_err(|source| KeysError::Make { path: path.to_owned(), source })
}

/// Makes a file that only its owner may read, whatever the umask is.
pub(crate) fn make(path: &Path, contents: &str) -> Result<(), KeysError> {
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).and_then(|mut file| {
        file.write_all(contents.as_bytes())?;
        file.sync_all()
    });
    made.map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => KeysError::There(path.to_owned()),
        _ => KeysError::Make { path: path.to_owned(), source },
    })
}

/// Checks that none of these files is there.
pub(crate) fn check_free(directory: &Path, names: &[&str]) -> Result<(), KeysError> {
    let taken = names.iter().map(|name| directory.join(name)).find(|path| fs::symlink_metadata(path).is_ok());
    taken.map_or(Ok(()), |path| Err(KeysError::There(path)))
}

/// Reads a file.
pub(crate) fn read(path: &Path) -> Result<String, KeysError> {
    let mut text = String::new();
    let read = fs::File::open(path).and_then(|file| file.take(MAX_FILE_BYTES).read_to_string(&mut text));
    read.map_err(|source| KeysError::Read { path: path.to_owned(), source })?;
    Ok(text)
}
