//! This module makes files and directories that only the daemon can read, whatever the umask is and whatever modes they
//! had.

use std::fs::{DirBuilder, File, Metadata, Permissions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use tracing::{info, warn};

/// These mode bits are the rights of all users other than the owner.
const OTHERS: u32 = 0o077;

/// Makes a directory, and those above it, if it is not there, and takes the rights of others to it away.
///
/// # Errors
///
/// Fails if it cannot be made, or if its mode cannot be changed.
pub fn directory(path: &Path) -> io::Result<()> {
    match std::fs::metadata(path) {
        Ok(found) => {
            tighten(path, &found);
            return Ok(());
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o700))?;
    path.parent().map_or(Ok(()), sync_directory)
}

/// Opens a file of the daemon's own to read and write, and makes an empty one where there is none.
///
/// # Errors
///
/// Fails if it cannot be opened, or if its mode cannot be changed.
pub fn open(path: &Path) -> io::Result<File> {
    if let Ok(found) = std::fs::metadata(path) {
        tighten(path, &found);
        return File::options().read(true).write(true).open(path);
    }
    let file = File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    Ok(file)
}

/// Puts a file with these contents in the place of `path`, such that a crash leaves either the old or the new one,
/// whole. [`sync_directory`] must be called next: until then, a crash of the host may bring the old one back.
///
/// # Errors
///
/// Fails if the new file cannot be written. The old one is then in place.
pub fn put(path: &Path, contents: &[u8]) -> io::Result<File> {
    slot(path, contents, File::sync_all)
}

/// Does the same as [`put`] for contents that need not outlive the host: a crash of the host may leave anything.
///
/// # Errors
///
/// Fails if the new file cannot be written. The old one is then in place.
pub fn put_volatile(path: &Path, contents: &[u8]) -> io::Result<()> {
    slot(path, contents, |_| Ok(())).map(drop)
}

/// Returns the path at which a file is written that is to take the place of `path`.
pub fn beside(path: &Path) -> PathBuf {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    beside.into()
}

fn slot(path: &Path, contents: &[u8], sync: fn(&File) -> io::Result<()>) -> io::Result<File> {
    let beside = &beside(path);
    let write = || {
        let mut file = open(beside)?;
        file.set_len(0)?;
        file.write_all(contents)?;
        sync(&file)?;
        std::fs::rename(beside, path)?;
        Ok(file)
    };
    write().inspect_err(|_| {
        // It may be what fills the disk.
        let _ = std::fs::remove_file(beside);
    })
}

/// Makes durable which files were made, renamed and removed in a directory.
///
/// # Errors
///
/// Fails if the directory cannot be opened or synced.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    File::open(path)?.sync_all()
}

/// Takes away the rights of others to a file or directory.
fn tighten(path: &Path, found: &Metadata) {
    let mode = found.permissions().mode() & 0o7777;
    if mode & OTHERS == 0 {
        return;
    }
    let (was, is) = (format!("{mode:04o}"), format!("{:04o}", mode & !OTHERS));
    match std::fs::set_permissions(path, Permissions::from_mode(mode & !OTHERS)) {
        Ok(()) => {
            info!(path = %path.display(), was, is, "others may no longer look into what is only the daemon's")
        }
        Err(error) => {
            warn!(path = %path.display(), is = was, %error, "others may look into what is only the daemon's; \
                give it to the daemon's user, with mode 0700 for a directory and 0600 for a file");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn nobody_else_may_look() {
        let root = tempfile::tempdir().unwrap();
        let (inner, file) = (root.path().join("a/b"), root.path().join("a/b/file"));
        directory(&inner).unwrap();
        assert_eq!((mode(&root.path().join("a")), mode(&inner)), (0o700, 0o700));
        open(&file).unwrap();
        assert_eq!(mode(&file), 0o600);
        put(&file, b"one").unwrap();
        assert_eq!((mode(&file), std::fs::read(&file).unwrap().as_slice()), (0o600, &b"one"[..]));

        // They were there already, and wide open.
        std::fs::set_permissions(&inner, Permissions::from_mode(0o755)).unwrap();
        std::fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
        directory(&inner).unwrap();
        open(&file).unwrap();
        assert_eq!((mode(&inner), mode(&file)), (0o700, 0o600));

        // What was left of an earlier attempt is longer, and wide open.
        let beside = beside(&file);
        std::fs::write(&beside, "a long text").unwrap();
        std::fs::set_permissions(&beside, Permissions::from_mode(0o666)).unwrap();
        put_volatile(&file, b"two").unwrap();
        assert_eq!((mode(&file), std::fs::read(&file).unwrap().as_slice()), (0o600, &b"two"[..]));
        assert!(!beside.exists());
    }
}
