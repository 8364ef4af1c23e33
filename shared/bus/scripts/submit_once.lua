-- Create records and work entries of one HTTP request, unless its idempotency key is in use. A key is void when one
-- of its requests has no record (refused, cancelled, failed, or expired), or if it cannot be read.
-- KEYS: idempotency key, stream, record...
-- ARGV: submission, expiry in s, prefix of records, v, gateway, (request, m)...
-- Returns the earlier submission, or false.
-- requires: typed
-- requires: note_entry
local known = is_a('string', KEYS[1]) and redis.call('GET', KEYS[1])
if known then
  local readable, earlier = pcall(cjson.decode, known)
  local alive = readable and type(earlier) == 'table' and type(earlier.request_ids) == 'table' and
    type(earlier.body_hash) == 'string' and #earlier.request_ids > 0
  for _, id in ipairs(alive and earlier.request_ids or {}) do
    alive = alive and type(id) == 'string' and redis.call('EXISTS', ARGV[3] .. id) == 1
  end
  if alive then return known end
end
for i = 3, #KEYS do
  local id = string.sub(KEYS[i], #ARGV[3] + 1)
  local entry = redis.call('XADD', KEYS[2], '*', 'v', ARGV[4], 'm', ARGV[2 * i + 1], 'r', id)
  redis.call('HSET', KEYS[i], 'request', ARGV[2 * i], 'epoch', '0', 'gateways', ARGV[5])
  note_entry(KEYS[i], KEYS[2], entry)
end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return false
