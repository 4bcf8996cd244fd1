//! Unix sockets in the file system.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Makes the directory of a socket and removes a socket that nobody listens on any more.
/// Refuses to take the place of a live one, or of anything else than a socket.
pub fn make_way(path: &Path) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let kind = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !kind.is_socket() {
        return Err(io::Error::other("what is there is no socket; remove it, or configure another path"));
    }
    let dead = match UnixStream::connect(path) {
        Ok(_) => false,
        // EPROTOTYPE: somebody listens, for another kind of socket.
        Err(error) => error.kind() == io::ErrorKind::ConnectionRefused,
    };
    if !dead {
        return Err(io::Error::other("another daemon listens there; stop it, or configure another path"));
    }
    std::fs::remove_file(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_dead_sockets_make_way() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/socket");
        make_way(&path).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        assert!(make_way(&path).unwrap_err().to_string().contains("another daemon"));
        drop(listener);
        make_way(&path).unwrap();
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        assert!(make_way(&path).unwrap_err().to_string().contains("is no socket"));
        assert!(path.exists());
    }
}
