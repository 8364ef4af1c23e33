-- Write a chunk of a pinned blob, and with the last one make the blob visible. Without its entry in the index it would
-- be in no budget, and nobody could delete it: the blob was deleted, or Redis has lost what was written before.
-- KEYS: index, sizes, pins
-- ARGV: prefix of blob keys, bytes of a chunk, member, expiry in s, size of the blob, its chunks, number of this one, data
-- Returns 1, or 0 if the blob is not pinned.
local key = ARGV[1] .. ARGV[3]
if not redis.call('ZSCORE', KEYS[3], ARGV[3]) then return 0 end
redis.call('SET', key .. ':' .. ARGV[7], ARGV[8], 'EX', ARGV[4])
if tonumber(ARGV[7]) + 1 == tonumber(ARGV[6]) then
  redis.call('HSET', key, 'size', ARGV[5], 'chunks', ARGV[6], 'meta', '')
  redis.call('EXPIRE', key, ARGV[4])
end
return 1
