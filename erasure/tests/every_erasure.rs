//! Every kernel against a codec that is slow and obvious, over every erasure pattern of every (w, m).
//!
//! The obvious codec shares nothing with the crate but the published coefficients: it multiplies polynomials bit
//! by bit, and it reconstructs by solving for all w data shards with the whole w × w system.

use weft_erasure::{Codec, DATA_SHARDS_MAX, Kernel, PARITY_SHARDS_MAX, ReconstructError, coefficient};

/// Polynomial multiplication, then reduction by 0x11d from the top bit down.
fn multiply(a: u8, b: u8) -> u8 {
    let mut product = 0u16;
    for bit in 0..8 {
        if b >> bit & 1 == 1 {
            product ^= u16::from(a) << bit;
        }
    }
    for bit in (8..15).rev() {
        if product >> bit & 1 == 1 {
            product ^= 0x11d << (bit - 8);
        }
    }
    u8::try_from(product).expect("reduced to eight bits")
}

/// The row of the generator matrix [I; C] that makes shard `shard` of a stripe of `w`.
fn generator_row(w: usize, shard: usize) -> Vec<u8> {
    (0..w)
        .map(|data| {
            if shard < w {
                u8::from(shard == data)
            } else {
                coefficient(shard - w, data)
            }
        })
        .collect()
}

fn obvious_shard(data: &[Vec<u8>], shard: usize) -> Vec<u8> {
    let row = generator_row(data.len(), shard);
    (0..data[0].len())
        .map(|at| {
            row.iter()
                .zip(data)
                .fold(0, |sum, (&c, shard)| sum ^ multiply(c, shard[at]))
        })
        .collect()
}

/// Solves for all data shards from exactly w shards. Panics when the system is singular.
fn obvious_data(w: usize, shards: &[(usize, &[u8])]) -> Vec<Vec<u8>> {
    assert_eq!(shards.len(), w);
    let mut system: Vec<(Vec<u8>, Vec<u8>)> = shards
        .iter()
        .map(|&(shard, bytes)| (generator_row(w, shard), bytes.to_vec()))
        .collect();
    for column in 0..w {
        let pivot = (column..w)
            .find(|&row| system[row].0[column] != 0)
            .expect("any w shards suffice");
        system.swap(column, pivot);
        let inverse = (1..=255)
            .find(|&candidate| multiply(candidate, system[column].0[column]) == 1)
            .expect("a pivot is not 0");
        scale(&mut system[column], inverse);
        let pivot = system[column].clone();
        for (row, equation) in system.iter_mut().enumerate() {
            if row != column {
                let mut multiple = pivot.clone();
                scale(&mut multiple, equation.0[column]);
                for (value, other) in equation.0.iter_mut().zip(multiple.0) {
                    *value ^= other;
                }
                for (value, other) in equation.1.iter_mut().zip(multiple.1) {
                    *value ^= other;
                }
            }
        }
    }
    system.into_iter().map(|(_, bytes)| bytes).collect()
}

fn scale(equation: &mut (Vec<u8>, Vec<u8>), factor: u8) {
    for value in equation.0.iter_mut().chain(&mut equation.1) {
        *value = multiply(*value, factor);
    }
}

/// Bytes without a pattern that a codec could mistake for another shard's.
fn noise(seed: usize, bytes: usize) -> Vec<u8> {
    let mut state = (seed as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..bytes)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 56) as u8
        })
        .collect()
}

fn stripe(w: usize, m: usize, bytes: usize) -> Vec<Vec<u8>> {
    let mut shards: Vec<Vec<u8>> = (0..w).map(|shard| noise(shard + 1, bytes)).collect();
    let parity: Vec<Vec<u8>> = (w..w + m).map(|shard| obvious_shard(&shards, shard)).collect();
    shards.extend(parity);
    shards
}

fn slices(shards: &[Vec<u8>]) -> Vec<&[u8]> {
    shards.iter().map(Vec::as_slice).collect()
}

fn slices_mut(shards: &mut [Vec<u8>]) -> Vec<&mut [u8]> {
    shards.iter_mut().map(Vec::as_mut_slice).collect()
}

/// Codecs of every kernel that this processor has, each m.
fn codecs() -> impl Iterator<Item = Codec> {
    (1..=PARITY_SHARDS_MAX as u8).flat_map(|m| {
        Kernel::available().map(move |kernel| Codec::with_kernel(m, kernel).expect("available"))
    })
}

/// Reaches the wide steps, a partial one and the byte-wise tail of every kernel.
const LENGTHS: [usize; 6] = [0, 1, 63, 64, 128, 3 * 128 + 64 + 32 + 16 + 5];

#[test]
fn parity_equals_the_obvious_codecs() {
    for codec in codecs() {
        for w in 1..=DATA_SHARDS_MAX {
            for bytes in LENGTHS {
                let shards = stripe(w, usize::from(codec.m()), bytes);
                let (data, expected) = shards.split_at(w);
                // Old bytes must not show through.
                let mut parity = vec![vec![0xa5; bytes]; expected.len()];
                codec.encode(&slices(data), &mut slices_mut(&mut parity));
                assert_eq!(parity, expected, "{codec:?} w {w}, {bytes} bytes");
            }
        }
    }
}

#[test]
fn every_erasure_pattern_is_reconstructed() {
    // Long enough for one wide step and a tail; short, because there are some 20 000 patterns per kernel.
    const BYTES: usize = 128 + 3;
    for codec in codecs() {
        let m = usize::from(codec.m());
        for w in 1..=DATA_SHARDS_MAX {
            let shards = stripe(w, m, BYTES);
            for erased in 0u32..1 << (w + m) {
                if erased.count_ones() as usize > m {
                    continue;
                }
                let is_erased = |shard: usize| erased >> shard & 1 == 1;
                // In descending order, so that nothing relies on the caller's.
                let present: Vec<(u8, &[u8])> = (0..w + m)
                    .rev()
                    .filter(|&shard| !is_erased(shard))
                    .map(|shard| (shard as u8, shards[shard].as_slice()))
                    .collect();
                let want: Vec<u8> = (0..w + m)
                    .filter(|&shard| is_erased(shard))
                    .map(|s| s as u8)
                    .collect();
                let mut found = vec![vec![0xa5; BYTES]; want.len()];
                codec
                    .reconstruct(w as u8, &present, &want, &mut slices_mut(&mut found))
                    .unwrap();
                for (&shard, found) in want.iter().zip(&found) {
                    assert_eq!(
                        *found,
                        shards[usize::from(shard)],
                        "{codec:?} w {w}, lost {want:?}"
                    );
                }
            }
        }
    }
}

/// The reference must be able to fail: from any w shards the obvious codec finds the data that was encoded.
#[test]
fn the_obvious_codec_solves_what_the_crate_encodes() {
    let codec = Codec::new(4).unwrap();
    let data: Vec<Vec<u8>> = (0..6).map(|shard| noise(shard + 70, 19)).collect();
    let mut parity = vec![vec![0; 19]; 4];
    codec.encode(&slices(&data), &mut slices_mut(&mut parity));
    let shards: Vec<&Vec<u8>> = data.iter().chain(&parity).collect();
    for chosen in 0u32..1 << 10 {
        if chosen.count_ones() != 6 {
            continue;
        }
        let chosen: Vec<(usize, &[u8])> = (0..10)
            .filter(|shard| chosen >> shard & 1 == 1)
            .map(|shard| (shard, shards[shard].as_slice()))
            .collect();
        assert_eq!(obvious_data(6, &chosen), data);
    }
}

#[test]
fn a_stripe_of_one_data_shard_is_a_copy() {
    for codec in codecs() {
        let data = noise(9, 4096);
        let mut parity = vec![vec![0; 4096]; usize::from(codec.m())];
        codec.encode(&[&data], &mut slices_mut(&mut parity));
        for copy in &parity {
            assert_eq!(*copy, data);
        }
    }
}

#[test]
fn a_narrow_stripe_is_a_wide_one_with_zeroes() {
    for codec in codecs() {
        let m = usize::from(codec.m());
        for w in 1..DATA_SHARDS_MAX {
            let data: Vec<Vec<u8>> = (0..w).map(|shard| noise(shard + 40, 200)).collect();
            let mut padded = data.clone();
            padded.resize(DATA_SHARDS_MAX, vec![0; 200]);
            let (mut narrow, mut wide) = (vec![vec![0; 200]; m], vec![vec![0; 200]; m]);
            codec.encode(&slices(&data), &mut slices_mut(&mut narrow));
            codec.encode(&slices(&padded), &mut slices_mut(&mut wide));
            assert_eq!(narrow, wide);
        }
    }
}

#[test]
fn parity_0_is_the_exclusive_or() {
    let data: Vec<Vec<u8>> = (0..5).map(|shard| noise(shard + 3, 77)).collect();
    let mut parity = vec![vec![0; 77]];
    Codec::new(1)
        .unwrap()
        .encode(&slices(&data), &mut slices_mut(&mut parity));
    let expected: Vec<u8> = (0..77)
        .map(|at| data.iter().fold(0, |sum, shard| sum ^ shard[at]))
        .collect();
    assert_eq!(parity[0], expected);
}

#[test]
fn shards_cut_anywhere_give_the_same_parity_and_data() {
    const BYTES: usize = 700;
    for codec in codecs() {
        let m = usize::from(codec.m());
        for w in [1, 3, 16] {
            let shards = stripe(w, m, BYTES);
            // Each shard in other pieces, some of them empty.
            let pieces: Vec<Vec<&[u8]>> = shards
                .iter()
                .enumerate()
                .map(|(shard, bytes)| {
                    let (first, rest) = bytes.split_at(shard * 31 % BYTES);
                    let (second, third) = rest.split_at(rest.len() / (shard % 3 + 1));
                    vec![first, &[], second, third]
                })
                .collect();
            let lists: Vec<&[&[u8]]> = pieces.iter().map(Vec::as_slice).collect();

            let mut parity = vec![vec![0xa5; BYTES]; m];
            codec.encode_scattered(&lists[..w], &mut slices_mut(&mut parity));
            assert_eq!(parity, shards[w..], "{codec:?} w {w}");

            // The first shards lost, as many as can be.
            let lost: Vec<u8> = (0..m as u8).collect();
            let present: Vec<u8> = (m as u8..(w + m) as u8).collect();
            let plan = codec.reconstruction(w as u8, &present, &lost).unwrap();
            let sources: Vec<&[&[u8]]> = plan
                .sources()
                .iter()
                .map(|&shard| lists[usize::from(shard)])
                .collect();
            let mut found = vec![vec![0xa5; BYTES]; m];
            plan.run_scattered(&sources, &mut slices_mut(&mut found));
            assert_eq!(found, shards[..m], "{codec:?} w {w}");
        }
    }
}

#[test]
fn a_short_or_empty_shard_counts_as_followed_by_zeroes() {
    for codec in codecs() {
        let m = usize::from(codec.m());
        let (long, short) = (noise(1, 300), noise(2, 100));
        let mut padded = short.clone();
        padded.resize(300, 0);
        let (mut expected, mut parity) = (vec![vec![0; 300]; m], vec![vec![0xa5; 300]; m]);
        codec.encode(&[&padded, &[0; 300], &long], &mut slices_mut(&mut expected));
        codec.encode_scattered(
            &[&[short.as_slice()], &[], &[&long[..130], &long[130..]]],
            &mut slices_mut(&mut parity),
        );
        assert_eq!(parity, expected);

        // Nothing but zeroes.
        codec.encode_scattered::<&[u8]>(&[&[], &[]], &mut slices_mut(&mut parity));
        assert_eq!(parity, vec![vec![0; 300]; m]);
    }
}

#[test]
fn shards_added_one_by_one_in_any_order_give_the_same_parity() {
    for codec in codecs() {
        let m = usize::from(codec.m());
        for w in 1..=DATA_SHARDS_MAX {
            let shards = stripe(w, m, 333);
            let mut parity = vec![vec![0; 333]; m];
            for index in (0..w).rev() {
                codec.accumulate(index, &shards[index], &mut slices_mut(&mut parity));
            }
            assert_eq!(parity, shards[w..], "{codec:?} w {w}");
        }
    }
}

#[test]
fn shards_present_may_be_wanted_too() {
    let shards = stripe(4, 2, 50);
    let present: Vec<(u8, &[u8])> = [1, 2, 3, 4, 5]
        .map(|shard| (shard, shards[usize::from(shard)].as_slice()))
        .to_vec();
    let want = [5, 4, 3, 2, 1, 0];
    let mut found = vec![vec![0; 50]; 6];
    Codec::new(2)
        .unwrap()
        .reconstruct(4, &present, &want, &mut slices_mut(&mut found))
        .unwrap();
    found.reverse();
    assert_eq!(found, shards);
}

#[test]
fn what_cannot_be_reconstructed_is_refused_with_numbers() {
    let codec = Codec::new(2).unwrap();
    let refusal = |w, present: &[u8], want: &[u8]| codec.reconstruction(w, present, want).unwrap_err();
    assert_eq!(
        refusal(4, &[0, 1, 5], &[2]),
        ReconstructError::TooFewShards {
            present: 3,
            needed: 4
        }
    );
    // The same shard twice is one.
    assert_eq!(
        refusal(4, &[0, 1, 1, 5], &[2]),
        ReconstructError::TooFewShards {
            present: 3,
            needed: 4
        }
    );
    assert_eq!(
        refusal(4, &[0, 1, 2, 6], &[3]),
        ReconstructError::NoSuchShard { shard: 6, shards: 6 }
    );
    assert_eq!(
        refusal(4, &[0, 1, 2, 3], &[255]),
        ReconstructError::NoSuchShard {
            shard: 255,
            shards: 6
        }
    );
    for w in [0, 17, 255] {
        assert_eq!(refusal(w, &[0], &[0]), ReconstructError::UnsupportedWidth { w });
    }
}

#[test]
fn a_codec_has_one_to_four_parities() {
    assert_eq!(Codec::new(0), None);
    assert_eq!(Codec::new(5), None);
    assert_eq!(Codec::new(4).map(Codec::m), Some(4));
}
