//! Archives in the format that the kernel unpacks an initramfs from: "newc", which is described in
//! Documentation/driver-api/early-userspace/buffer-format.rst.

/// An archive in memory.
#[derive(Debug, Default)]
pub(crate) struct CpioArchive {
    bytes: Vec<u8>,
    entries: u32,
}

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const END: &str = "TRAILER!!!";

impl CpioArchive {
    /// Adds a directory. The directories above it must be added before.
    pub(crate) fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY, &[]);
    }

    /// Adds a file that every user may read and execute.
    pub(crate) fn file(&mut self, path: &str, contents: &[u8]) {
        self.entry(path, PROGRAM, contents);
    }

    /// Returns the bytes of the archive, with the mark of its end.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry(END, 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, contents: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(contents.len()).expect("an initramfs file is far below 4 GiB");
        let name = path.len() as u32 + 1;
        // Inode, mode, owner, group, links, time, size, device, device of the file, length of the name, checksum.
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_what_the_kernel_expects() {
        let mut archive = CpioArchive::default();
        archive.directory("dev");
        archive.file("init", b"hello");
        let bytes = archive.finish();
        assert!(bytes.starts_with(b"070701"));
        assert!(bytes.len().is_multiple_of(4));
        // Header of 110 bytes and "dev\0", padded to 4; then the next header.
        assert_eq!(&bytes[110..116], b"dev\0\0\0"[..6].as_ref());
        let second = &bytes[116..];
        assert!(second.starts_with(b"070701"));
        assert_eq!(&second[6 + 6 * 8..6 + 7 * 8], b"00000005");
        assert_eq!(&second[110..120], b"init\0\0hell");
        assert!(String::from_utf8_lossy(&bytes).contains(END));
    }
}
