-- Prelude: `add_entry` appends an entry of a request to a work stream, with its place in the order of service if it has
-- one (k, or ''); returns its id.
local function add_entry(stream, v, m, r, k)
  if k and k ~= '' then return redis.call('XADD', stream, '*', 'v', v, 'm', m, 'r', r, 'k', k) end
  return redis.call('XADD', stream, '*', 'v', v, 'm', m, 'r', r)
end
