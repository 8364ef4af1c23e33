-- Take or give up shards towards a fair share. With N shards and R replicas each owns N // R, and N % R of them one
-- more: the replicas that own it already, so that no shard moves without need.
-- KEYS: shards
-- ARGV: prefix of lease keys, replica, number of shards, number of other ready replicas, their names..., shards held...
-- Returns {shard, epoch, ...} of all shards that the replica owns now.
local count, others, held = tonumber(ARGV[3]), tonumber(ARGV[4]), {}
local theirs = {}
for i = 5, 4 + others do theirs[ARGV[i]] = 0 end
for i = 5 + others, #ARGV do held[tonumber(ARGV[i])] = true end
redis.call('HSETNX', KEYS[1], 'count', count)

local function own(shard, epoch, owner)
  redis.call('HSET', KEYS[1], shard, string.format('%d %s', epoch, owner))
end

local mine, free = {}, {}
for shard = 0, count - 1 do
  local epoch, owner = string.match(redis.call('HGET', KEYS[1], shard) or '0 ', '^(%d+) (.*)$')
  if owner == ARGV[2] then
    if not held[shard] then
      epoch = epoch + 1
      own(shard, epoch, owner)
    end
    mine[#mine + 1] = {shard, tonumber(epoch)}
  elseif owner == '' or redis.call('EXISTS', ARGV[1] .. owner) == 0 then
    free[#free + 1] = {shard, epoch + 1}
  elseif theirs[owner] then
    theirs[owner] = theirs[owner] + 1
  end
end

local share, larger = math.floor(count / (others + 1)), 0
for _, number in pairs(theirs) do
  if number > share then larger = larger + 1 end
end
if larger < count % (others + 1) then share = share + 1 end

while #mine > share do
  local shard, epoch = unpack(table.remove(mine))
  own(shard, epoch, '')
end
for _, taken in ipairs(free) do
  if #mine >= share then break end
  own(taken[1], taken[2], ARGV[2])
  mine[#mine + 1] = taken
end
local flat = {}
for _, owned in ipairs(mine) do flat[#flat + 1], flat[#flat + 2] = owned[1], owned[2] end
return flat
