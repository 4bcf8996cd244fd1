//! A key that seals or opens the records of one direction (RFC 8446, sections 5.2 and 5.3).

use ring::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey,
};
use rustls::ConnectionTrafficSecrets;

use super::{APPLICATION_DATA, HEADER_BYTES, MAX_RECORD_BYTES, TAG_BYTES};
use crate::TlsError;

/// A key, and the number of its next record.
pub(super) struct Key {
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
}

impl Key {
    pub(super) fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, TlsError> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(TlsError::Protocol("the cipher is not known here")),
        };
        Self::make(algorithm, key.as_ref(), iv.as_ref(), sequence)
    }

    fn make(algorithm: &'static Algorithm, key: &[u8], iv: &[u8], sequence: u64) -> Result<Self, TlsError> {
        let key = UnboundKey::new(algorithm, key)
            .map_err(|_| TlsError::Protocol("the key is not as long as its cipher demands"))?;
        let iv = iv.try_into().map_err(|_| TlsError::Protocol("the nonce has a wrong length"))?;
        Ok(Self { key: LessSafeKey::new(key), iv, sequence })
    }

    /// Returns the number of the next record.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Makes a record of `count` bytes, which `copy` fills in, at the beginning of `out`. Returns its length.
    pub(super) fn seal(
        &mut self,
        content: u8,
        count: usize,
        out: &mut [u8],
        copy: impl FnOnce(&mut [u8]),
    ) -> usize {
        let header = header(count + 1 + TAG_BYTES);
        let (place, rest) = out.split_at_mut(HEADER_BYTES);
        place.copy_from_slice(&header);
        let (inner, rest) = rest.split_at_mut(count + 1);
        copy(&mut inner[..count]);
        inner[count] = content;
        let nonce = self.next_nonce();
        let tag = self.key.seal_in_place_separate_tag(nonce, Aad::from(header), inner);
        let tag = tag.expect("a record is far below the length that a cipher seals");
        rest[..TAG_BYTES].copy_from_slice(tag.as_ref());
        HEADER_BYTES + count + 1 + TAG_BYTES
    }

    /// Opens what follows the header of a record, in its place. Returns the kind of contents and their length.
    pub(super) fn open(
        &mut self,
        header: [u8; HEADER_BYTES],
        sealed: &mut [u8],
    ) -> Result<(u8, usize), TlsError> {
        let nonce = self.next_nonce();
        let opened = self.key.open_in_place(nonce, Aad::from(header), sealed).map_err(|_| TlsError::Open)?;
        // Zeros may stand behind the type, to hide how long the contents are.
        let end = opened.iter().rposition(|byte| *byte != 0);
        let end = end.ok_or(TlsError::Protocol("a record has no type"))?;
        if end > MAX_RECORD_BYTES {
            return Err(TlsError::Protocol("a record is too long"));
        }
        Ok((opened[end], end))
    }

    fn next_nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, number) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        // Keys are changed long before: 2^64 records do not come.
        self.sequence += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Returns the header of a record with so many bytes behind it. All look like application data of TLS 1.2.
pub(super) fn header(length: usize) -> [u8; HEADER_BYTES] {
    let [high, low] = (length as u16).to_be_bytes();
    [APPLICATION_DATA, 3, 3, high, low]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The application keys of the client in the trace of RFC 8448, section 3, and the record that it sends with them.
    #[test]
    fn seals_and_opens_the_records_of_rfc_8448() {
        let key = hex("17422dda596ed5d9acd890e3c63f5051");
        let iv = hex("5b78923dee08579033e523d9");
        let record = hex(
            "1703030043a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f2b9819a8a5b46b395bd54a9a20441e2b62974e1f\
             5a6292a2977014bd1e3deae63aeebb21694915e4",
        );
        let data: Vec<u8> = (0..50).collect();
        let make = || Key::make(&AES_128_GCM, &key, &iv, 0).unwrap();
        let mut sealed = vec![0; record.len()];
        let length =
            make().seal(APPLICATION_DATA, data.len(), &mut sealed, |place| place.copy_from_slice(&data));
        assert!(length == record.len() && sealed == record);
        let (header, body) = sealed.split_first_chunk_mut().unwrap();
        assert_eq!(make().open(*header, body).unwrap(), (APPLICATION_DATA, data.len()));
        assert_eq!(body[..data.len()], data);
    }

    fn hex(digits: &str) -> Vec<u8> {
        (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
    }
}
