//! The input of an encoder: `x_t = word[id_t] + position[offset + position_t] + kind[0]`.
//!
//! Backward adds each row of dx to its rows of the tables' gradients. Threads divide the rows of a table among them, never
//! the tokens, and a row's tokens are added in their order: the same bits for any number of threads, without atomics.

use crate::Packing;
use crate::rows::{add, new_rows, new_rows_and_sums, take};
use crate::simd::{fill_rows, rows_per_task, vectorised};
use crate::tensor::{expect_shape, matrix, packed, read, tensor, write};
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;
use std::iter::zip;

#[cfg(any(test, gpu))]
mod gpu;

/// What is looked up and added.
#[derive(Clone, Copy, Debug)]
pub struct Tables<'a> {
    /// `(V, D)`, by the token's id.
    pub word: &'a Tensor,
    /// `(P, D)`, by the token's position in its sequence; None with rotary positions.
    pub position: Option<&'a Tensor>,
    /// Where position 0 lies in `position`: 2 in RoBERTa, whose first two rows are its padding's.
    pub position_offset: usize,
    /// `(types, D)`, BERT's segments. A text is one segment: row 0.
    pub kind: Option<&'a Tensor>,
}

/// x `(T, D)` of the u32 `ids` `(T)`.
///
/// # Errors
/// If an id or a position lies outside its table, a shape is not as said, or a tensor is not contiguous.
pub fn forward(ids: &Tensor, packing: &Packing, tables: &Tables) -> Result<Tensor> {
    #[cfg(gpu)]
    if crate::gpu::runs(tables.word.device()) {
        return gpu::forward(ids, packing, tables);
    }
    let tokens = packing.tokens();
    let (words, width) = matrix("word", tables.word)?;
    let (ids, word) = (read::<u32>(ids)?, read::<f32>(tables.word)?);
    let (ids, word) = (&*ids, &*word);
    expect_ids(ids, tokens, words)?;
    if let Some(position) = tables.position {
        expect_positions(position, packing, tables.position_offset, width)?;
    }
    if let Some(kind) = tables.kind {
        expect_kinds(kind, width)?;
    }
    let position = tables.position.map(read::<f32>).transpose()?;
    let kind = tables.kind.map(read::<f32>).transpose()?;
    let (position, kind) = (position.as_deref(), kind.as_deref());

    let [x] = new_rows(
        tokens,
        [width],
        #[inline(always)]
        |t, [x]| {
            let mut x = x.fill(word[ids[t] as usize * width..][..width].iter().copied());
            if let Some(position) = position {
                add(&mut x, &position[(tables.position_offset + packing.locate(t).1) * width..][..width]);
            }
            if let Some(kind) = kind {
                add(&mut x, &kind[..width]);
            }
            [x]
        },
    );
    tensor(x, (tokens, width))
}

/// Adds the gradient `dx` `(T, D)` to those of the tables: `dword` `(V, D)`, `dposition` `(P, D)` and `dkind` `(types, D)`,
/// each unless frozen.
///
/// # Errors
/// If an id or a position lies outside its table, a shape is not as said, or a tensor is not contiguous.
pub fn backward(
    dx: &Tensor,
    ids: &Tensor,
    packing: &Packing,
    position_offset: usize,
    dword: Option<&Tensor>,
    dposition: Option<&Tensor>,
    dkind: Option<&Tensor>,
) -> Result<()> {
    #[cfg(gpu)]
    if crate::gpu::runs(dx.device()) {
        return gpu::backward(dx, ids, packing, position_offset, dword, dposition, dkind);
    }
    let (tokens, width) = packed("dx", dx, packing)?;
    let dxs = read::<f32>(dx)?;
    let dxs = &*dxs;
    if let Some(dword) = dword {
        let (words, _) = matrix("dword", dword)?;
        expect_shape("dword", dword, &[words, width])?;
        let ids = read::<u32>(ids)?;
        expect_ids(&ids, tokens, words)?;
        write(dword, |dword| add_words(dword, width, &ids, dxs))?;
    }
    if let Some(dposition) = dposition {
        expect_positions(dposition, packing, position_offset, width)?;
        write(dposition, |dposition| {
            let rows = &mut dposition[position_offset * width..][..packing.longest() * width];
            fill_rows(
                rows,
                width,
                #[inline(always)]
                |position, row| {
                    for range in packing.ranges().filter(|range| position < range.len()) {
                        add(row, &dxs[(range.start + position) * width..][..width]);
                    }
                },
            );
        })?;
    }
    if let Some(dkind) = dkind {
        expect_kinds(dkind, width)?;
        let ([], sum) = new_rows_and_sums(
            tokens,
            [],
            width,
            #[inline(always)]
            |t, [], sum| {
                add(sum, &dxs[t * width..][..width]);
                []
            },
        );
        write(dkind, |dkind| add(&mut dkind[..width], &sum))?;
    }
    Ok(())
}

/// Adds row t of `dx` to row `ids[t]` of `table`, all rows of `width`.
fn add_words(table: &mut [f32], width: usize, ids: &[u32], dx: &[f32]) {
    // By word, and each word's tokens in their order.
    let mut order: Vec<(u32, u32)> = zip(ids.iter().copied(), 0..).collect();
    order.par_sort_unstable();

    // Pieces of about as many tokens each, none of which shares a word with the next: so each has rows of its own.
    let fair = rows_per_task(order.len(), width);
    let mut pieces = Vec::new();
    let (mut left, mut rows, mut first) = (order.as_slice(), table, 0);
    while !left.is_empty() {
        let mut end = fair.min(left.len());
        while end < left.len() && left[end].0 == left[end - 1].0 {
            end += 1;
        }
        let (piece, later) = left.split_at(end);
        let next = piece[end - 1].0 as usize + 1;
        pieces.push((piece, take(&mut rows, (next - first) * width), first));
        (left, first) = (later, next);
    }
    pieces.into_par_iter().for_each(|(piece, rows, first)| {
        vectorised(
            #[inline(always)]
            || {
                for &(id, t) in piece {
                    add(
                        &mut rows[(id as usize - first) * width..][..width],
                        &dx[t as usize * width..][..width],
                    );
                }
            },
        );
    });
}

fn expect_ids(ids: &[u32], tokens: usize, words: usize) -> Result<()> {
    if ids.len() != tokens {
        bail!("there are {} ids, but the sequences have {tokens} tokens", ids.len());
    }
    match ids.iter().position(|&id| id as usize >= words) {
        Some(t) => bail!("token {t} has the id {}, but the table has {words} words", ids[t]),
        None => Ok(()),
    }
}

fn expect_positions(table: &Tensor, packing: &Packing, offset: usize, width: usize) -> Result<()> {
    let (positions, _) = matrix("position", table)?;
    expect_shape("position", table, &[positions, width])?;
    if packing.longest() + offset > positions {
        bail!(
            "a sequence has {} tokens, but the position table has {positions} rows, the first {offset} of them unused",
            packing.longest()
        );
    }
    Ok(())
}

fn expect_kinds(table: &Tensor, width: usize) -> Result<()> {
    let (kinds, _) = matrix("kind", table)?;
    if kinds == 0 {
        bail!("the table of kinds is empty");
    }
    expect_shape("kind", table, &[kinds, width])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{finite_difference, inner, numbers, random, relative_error};
    use candle_core::Device;

    /// 11 words, of which some come often and some never.
    pub(super) fn ids(tokens: usize) -> Vec<u32> {
        (0..tokens).map(|t| (t * t % 11) as u32).collect()
    }

    pub(super) fn id_tensor(ids: &[u32]) -> Tensor {
        Tensor::new(ids, &Device::Cpu).unwrap()
    }

    pub(super) fn reference(
        ids: &[u32],
        packing: &Packing,
        width: usize,
        offset: usize,
        word: &[f64],
        position: &[f64],
        kind: &[f64],
    ) -> Vec<f64> {
        let mut x = Vec::new();
        for (t, &id) in ids.iter().enumerate() {
            let p = packing.locate(t).1 + offset;
            x.extend((0..width).map(|d| word[id as usize * width + d] + position[p * width + d] + kind[d]));
        }
        x
    }

    #[test]
    fn values_equal_the_reference_for_odd_and_empty_shapes() {
        for (lengths, width) in
            [(vec![], 3), (vec![2], 0), (vec![1], 1), (vec![3, 0, 7], 7), (vec![1023, 5], 33)]
        {
            let packing = Packing::new(&lengths, vec![0; lengths.len()]);
            let ids = ids(packing.tokens());
            let (word, position, kind) =
                (random(1, (11, width)), random(2, (1025, width)), random(3, (2, width)));
            let tables =
                Tables { word: &word, position: Some(&position), position_offset: 2, kind: Some(&kind) };
            let want =
                reference(&ids, &packing, width, 2, &numbers(&word), &numbers(&position), &numbers(&kind));
            // Two additions.
            let x = forward(&id_tensor(&ids), &packing, &tables).unwrap();
            assert!(relative_error(&x, &want) < 2e-7, "{lengths:?} {width}");

            let tables = Tables { word: &word, position: None, position_offset: 0, kind: None };
            let zeros = vec![0.0; 1023 * width];
            let want = reference(&ids, &packing, width, 0, &numbers(&word), &zeros, &zeros);
            assert_eq!(numbers(&forward(&id_tensor(&ids), &packing, &tables).unwrap()), want);
        }
    }

    #[test]
    fn gradients_equal_finite_differences_and_are_added() {
        let (packing, width, offset) = (Packing::new(&[3, 0, 5, 1], vec![0; 4]), 3, 1);
        let ids = ids(9);
        let (word, position, kind) = (random(1, (11, width)), random(2, (7, width)), random(3, (2, width)));
        let dx = random(4, (9, width));
        let (words, positions, kinds, dxs) =
            (numbers(&word), numbers(&position), numbers(&kind), numbers(&dx));
        let loss =
            |w: &[f64], p: &[f64], k: &[f64]| inner(&reference(&ids, &packing, width, offset, w, p, k), &dxs);
        let want = [
            finite_difference(&words, |w| loss(w, &positions, &kinds)),
            finite_difference(&positions, |p| loss(&words, p, &kinds)),
            finite_difference(&kinds, |k| loss(&words, &positions, k)),
        ];
        let got = [random(5, (11, width)), random(6, (7, width)), random(7, (2, width))];
        let want: Vec<Vec<f64>> = zip(&got, want)
            .map(|(got, want)| zip(numbers(got), want).map(|(a, b)| a + b).collect())
            .collect();
        let [dword, dposition, dkind] = &got;
        backward(&dx, &id_tensor(&ids), &packing, offset, Some(dword), Some(dposition), Some(dkind)).unwrap();
        for (got, want) in zip(&got, &want) {
            assert!(relative_error(got, want) < 3e-7);
        }
    }

    #[test]
    fn gradients_do_not_depend_on_the_number_of_threads() {
        let (packing, width) = (Packing::new(&[4000, 97], vec![0; 2]), 40);
        let (dx, ids) = (random(1, (4097, width)), id_tensor(&ids(4097)));
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let gradients = [(11, width), (4000, width), (2, width)].map(|shape| random(2, shape));
            let [word, position, kind] = &gradients;
            pool.install(|| {
                backward(&dx, &ids, &packing, 0, Some(word), Some(position), Some(kind)).unwrap()
            });
            gradients.map(|gradient| numbers(&gradient))
        };
        let one = on(1);
        assert_eq!(one, on(2));
        assert_eq!(one, on(5));

        // In the order of the tokens: as plain f32 additions one after the other.
        let (dxs, ids) = (dx.flatten_all().unwrap().to_vec1::<f32>().unwrap(), ids.to_vec1::<u32>().unwrap());
        let mut plain = random(2, (11, width)).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for (t, id) in ids.iter().enumerate() {
            for d in 0..width {
                plain[*id as usize * width + d] += dxs[t * width + d];
            }
        }
        assert_eq!(one[0], plain.into_iter().map(f64::from).collect::<Vec<_>>());
    }

    #[test]
    fn ids_and_positions_outside_their_tables_are_errors() {
        let (word, position) = (random(1, (11, 3)), random(2, (4, 3)));
        let tables = Tables { word: &word, position: Some(&position), position_offset: 2, kind: None };
        let (two, three) = (Packing::new(&[2], vec![0]), Packing::new(&[3], vec![0]));
        let error = forward(&id_tensor(&[1, 11]), &two, &tables).unwrap_err().to_string();
        assert!(
            error.contains("token 1") && error.contains("id 11") && error.contains("11 words"),
            "{error}"
        );
        let error = forward(&id_tensor(&[1, 2, 3]), &three, &tables).unwrap_err().to_string();
        assert!(error.contains("3 tokens") && error.contains("4 rows"), "{error}");
        assert!(forward(&id_tensor(&[1]), &two, &tables).is_err());
        assert!(
            forward(&id_tensor(&[1, 2]), &two, &Tables { kind: Some(&random(1, (0, 3))), ..tables }).is_err()
        );
        assert!(forward(&random(1, 2), &two, &tables).is_err());

        let (dx, ids) = (random(1, (2, 3)), id_tensor(&[1, 11]));
        assert!(backward(&dx, &ids, &two, 0, Some(&word), None, None).is_err());
        assert!(backward(&dx, &ids, &two, 3, None, Some(&position), None).is_err());
        assert!(backward(&dx, &ids, &two, 0, None, None, Some(&random(1, (1, 4)))).is_err());
        assert!(backward(&dx, &ids, &three, 0, None, None, None).is_err());
        assert!(backward(&dx, &ids, &two, 0, None, None, None).is_ok());
    }
}
