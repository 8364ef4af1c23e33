-- Create a batch, unless its tenant has too many lines under way or its owner too many batches.
-- KEYS: batch, batches that have not ended, batches of the owner
-- ARGV: prefix of batches, batch, what it is as JSON, time of creation, its lines, tenant, most lines of the tenant
-- (empty: any number), most batches of an owner, owner
-- Returns {limit that refuses or '', the number that there is}.
local function lines_under_way()
  local lines = 0
  for _, id in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
    local tenant, total, completed, failed = unpack(
      redis.call('HMGET', ARGV[1] .. id, 'tenant', 'total', 'completed', 'failed'))
    if tenant == ARGV[6] then lines = lines + total - (completed or 0) - (failed or 0) end
  end
  return lines
end

if redis.call('EXISTS', KEYS[1]) == 1 then return {'', 0} end
if redis.call('ZCARD', KEYS[3]) >= tonumber(ARGV[8]) then
  for _, id in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
    if redis.call('EXISTS', ARGV[1] .. id) == 0 then redis.call('ZREM', KEYS[3], id) end
  end
  local count = redis.call('ZCARD', KEYS[3])
  if count >= tonumber(ARGV[8]) then return {'batches', count} end
end
if ARGV[7] ~= '' then
  local lines = lines_under_way()
  if lines + ARGV[5] > tonumber(ARGV[7]) then return {'batch_lines', lines} end
end
redis.call('HSET', KEYS[1], 'about', ARGV[3], 'status', 'validating', 'total', ARGV[5], 'tenant', ARGV[6],
  'owner', ARGV[9])
redis.call('ZADD', KEYS[2], ARGV[4], ARGV[2])
redis.call('ZADD', KEYS[3], ARGV[4], ARGV[2])
return {'', 0}
