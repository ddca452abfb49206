//! ISA-L at run time: three functions of `libisal.so.2`, found with dlopen.
//!
//! Nothing is linked or built for it, so that the bench needs no package and runs without it.
#![expect(unsafe_code, reason = "calls into a C library that is loaded at run time")]

use std::ffi::{CStr, c_char, c_int, c_void};

use weft_erasure::coefficient;

unsafe extern "C" {
    fn dlopen(file: *const c_char, mode: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, symbol: *const c_char) -> *mut c_void;
}

const RTLD_NOW: c_int = 2;

/// `ec_init_tables(k, rows, coefficients, tables)`: 32 bytes of table for each coefficient.
type InitTables = unsafe extern "C" fn(c_int, c_int, *const u8, *mut u8);
/// `ec_encode_data(bytes, k, rows, tables, data, coding)`.
type EncodeData = unsafe extern "C" fn(c_int, c_int, c_int, *const u8, *const *const u8, *const *mut u8);

/// The library, loaded for the rest of the process.
pub(crate) struct IsaL {
    init_tables: InitTables,
    encode_data: EncodeData,
}

/// It, for one k and m.
pub(crate) struct Encoder<'a> {
    isal: &'a IsaL,
    k: usize,
    m: usize,
    tables: Vec<u8>,
}

impl IsaL {
    pub(crate) fn load() -> Option<Self> {
        // SAFETY: a NUL-terminated name; loading it runs the constructors of a library that the operator installed.
        let library = unsafe { dlopen(c"libisal.so.2".as_ptr(), RTLD_NOW) };
        if library.is_null() {
            return None;
        }
        let find = |name: &CStr| {
            // SAFETY: the handle is a library's, the name NUL-terminated.
            let found = unsafe { dlsym(library, name.as_ptr()) };
            (!found.is_null()).then_some(found)
        };
        let (init_tables, encode_data) = (find(c"ec_init_tables")?, find(c"ec_encode_data")?);
        // SAFETY: the signatures are those of erasure_code.h, the same in every version of libisal.so.2.
        unsafe {
            Some(Self {
                init_tables: std::mem::transmute::<*mut c_void, InitTables>(init_tables),
                encode_data: std::mem::transmute::<*mut c_void, EncodeData>(encode_data),
            })
        }
    }

    /// With our coefficients, so that the parity is ours.
    pub(crate) fn encoder(&self, k: usize, m: usize) -> Encoder<'_> {
        let coefficients: Vec<u8> = (0..m)
            .flat_map(|parity| (0..k).map(move |data| coefficient(parity, data)))
            .collect();
        let mut tables = vec![0; 32 * k * m];
        // SAFETY: m × k coefficients, and 32 bytes of table for each.
        unsafe { (self.init_tables)(k as c_int, m as c_int, coefficients.as_ptr(), tables.as_mut_ptr()) };
        Encoder {
            isal: self,
            k,
            m,
            tables,
        }
    }
}

impl Encoder<'_> {
    pub(crate) fn encode(&self, data: &[&[u8]], parity: &mut [&mut [u8]]) {
        let bytes = data[0].len();
        assert_eq!((data.len(), parity.len()), (self.k, self.m));
        assert!(
            data.iter().all(|shard| shard.len() == bytes) && parity.iter().all(|shard| shard.len() == bytes)
        );
        let mut sources = [std::ptr::null(); 16];
        for (pointer, shard) in sources.iter_mut().zip(data) {
            *pointer = shard.as_ptr();
        }
        let mut outputs = [std::ptr::null_mut(); 4];
        for (pointer, shard) in outputs.iter_mut().zip(parity) {
            *pointer = shard.as_mut_ptr();
        }
        // SAFETY: k sources and m outputs of `bytes` bytes each, as asserted, and tables for k × m coefficients.
        unsafe {
            (self.isal.encode_data)(
                bytes as c_int,
                self.k as c_int,
                self.m as c_int,
                self.tables.as_ptr(),
                sources.as_ptr(),
                outputs.as_ptr(),
            );
        }
    }
}
